"""This rank's share of the sampling, and what the ranks tell each other of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from kdmesh.errors import DeadlineExpired, EngineFailure, ModelMismatch, RpcError
from kdmesh.tokens import digest
from kdmesh.types import FinishReason, Sample, Sampling, TokenSequence
from kdmesh_trainer.data.encoding.sides import Prompt, teacher_side
from kdmesh_trainer.sources.judge import Judge
from kdmesh_trainer.sources.order import StepPrompt
from kdmesh_trainer.sources.rollouts import PendingSamples, Rollout, RolloutService, Verdict, spans_of
from kdmesh_trainer.sources.shares import Share, nothing, samples_of, share_of

log = logging.getLogger(__name__)

# (a prompt, it with a response) -> that with what the teacher's tokenizer has for both. In any thread; always the same.
ReadResponse = Callable[[Prompt, TokenSequence], TokenSequence]


class StepPrompts(Protocol):
    """Which prompts are sampled together; a PromptOrder says it of training."""

    def of_step(self, step: int) -> Sequence[StepPrompt]:
        """The step's prompts, over all ranks; always the same."""
        ...

    def counts(self, step: int) -> Mapping[str, int]:
        """How many of them are of each dataset of a blend, by name; empty for a single dataset."""
        ...


class EpisodeService(Protocol):
    """Where episodes come from; an Episodes is one."""

    def submit(
        self,
        prompt: StepPrompt,
        sampling: Sampling,
        *,
        num_samples: int,
        min_weight_version: int,
        on_sample: Callable[[Sample], None],
    ) -> PendingSamples:
        """Ask for episodes of one prompt; `sampling` is of each turn. Otherwise as RolloutService."""
        ...


def _ignore(sequence: TokenSequence) -> None:
    """Nobody wants to know."""


class Sampler:
    """Asks for the samples of every `ranks`-th prompt of a step, and collects them."""

    def __init__(
        self,
        order: StepPrompts,
        service: RolloutService,
        *,
        sampling: Sampling,
        samples_per_prompt: int,
        rank: int,
        ranks: int,
        read: ReadResponse | None = None,
        judge: Judge | None = None,
        episodes: EpisodeService | None = None,
        asks_late_again: bool = False,
    ) -> None:
        """
        Args:
            read: None where the teacher has the student's tokenizer.
            judge: None: all samples count alike.
            episodes: of turns that `service` draws; None: nobody answers, and a response is all.
            asks_late_again: ask once more for what does not come by the service's deadline while other requests are
                answered: it waited behind them.
        """
        self._asks_late_again = asks_late_again
        self._read = read
        self._judge = judge
        self._episodes = episodes
        self._order = order
        self._service = service
        self._sampling = sampling
        self._samples_per_prompt = samples_per_prompt
        self._rank = rank
        self._ranks = ranks
        self._asked: dict[int, list[_Ask]] = {}  # by step
        self._complete_s = 0.0  # when the last sample came of those that were collected last

    def ask(self, step: int, *, min_weight_version: int, on_sample: Callable[[TokenSequence], None] = _ignore) -> None:
        """Ask for this rank's share of `step`. Does not block.

        Args:
            on_sample: called in any thread with each sample that counts as it comes, as the teacher reads it; must not
                block. What it was called with need not be what `collect` gives: a sample may be drawn again, or be
                refused there.
        """
        mine = self._order.of_step(step)[self._rank :: self._ranks]
        self._asked[step] = [_Ask(prompt, min_weight_version, on_sample, self._rollout, self._judge) for prompt in mine]
        self._send(step)

    def homes(self, step: int) -> list[int]:
        """The rank that asked for each rollout of a step, in the order of `assemble`."""
        places = range(len(self._order.of_step(step)))
        return [place % self._ranks for place in places for _ in range(self._samples_per_prompt)]

    def counts(self, step: int) -> Mapping[str, int]:
        """How many of a step's samples, over all ranks, are of each dataset of a blend, by name."""
        return {name: count * self._samples_per_prompt for name, count in self._order.counts(step).items()}

    def is_here(self, step: int) -> bool:
        """Whether `collect` would return, or raise, at once."""
        return all(ask.is_done for ask in self._asked[step])

    def collect(self, step: int) -> Share:
        """Block until every answer of this rank's share has come, and is judged.

        When servers refuse because their weights are too old, or one came back with old ones, the share is not whole.
        Then they need newer ones, after which `ask_again` asks for what was refused, and this for the share once more.

        Raises:
            EngineFailure: a server sent another number of samples, or longer ones, than it was asked for.
            RpcError: samples will not come.
        """
        began_s = time.perf_counter()
        asks = self._asked[step]
        while (
            is_here := self._service.wait([ask.pending for ask in asks if ask.pending is not None])
        ) and self._has_asked_late_again(step):
            pass
        refusals = [refusal for ask in asks if (refusal := ask.collect())] if is_here else []
        wait_s = time.perf_counter() - began_s
        if refusals or not is_here:
            return nothing(
                wait_s=wait_s, refusal="".join(refusals[:1]), outdated=tuple(sorted(self._service.outdated()))
            )
        for ask in asks:
            if (misfit := self._misfit(ask.samples)) is not None:
                raise EngineFailure(misfit)
        sequences = [
            Rollout.of(ask.prompt.token_ids, sample, images=ask.prompt.images).sequence
            for ask in asks
            for sample in ask.samples
        ]
        return share_of(
            [sample for ask in asks for sample in ask.samples],
            [verdict for ask in asks for verdict in ask.verdicts],
            digest=digest(sequences),
            wait_s=wait_s,
            drawing_s=self._drawing_s(asks),
        )

    def note_weights(self, version: int, *, behind: Collection[str]) -> None:
        """Every server but those at the addresses `behind` serves this version now."""
        self._service.note_weights(version, behind=behind)

    def ask_again(self, step: int) -> None:
        """Ask once more for what was refused."""
        self._send(step)

    def assemble(self, step: int, shares: Sequence[Share]) -> list[Rollout]:
        """All rollouts of the step, by prompt and then by seed, from the share of every rank.

        Raises:
            EngineFailure: a rank sampled from other prompts than this one would have.
        """
        self._asked.pop(step, None)  # not before: a rank that had all may be asked once more, for another's sake
        prompts = self._order.of_step(step)
        by_place: dict[int, list[Rollout]] = {}
        for rank, share in enumerate(shares):
            places = range(rank, len(prompts), self._ranks)
            rollouts = self._rollouts([prompts[place] for place in places], share, rank)
            for number, place in enumerate(places):
                first = number * self._samples_per_prompt
                by_place[place] = rollouts[first : first + self._samples_per_prompt]
        return [rollout for place in range(len(prompts)) for rollout in by_place[place]]

    def arrived(self) -> Iterator[tuple[int, int, list[Rollout]]]:
        """What has come of this rank's share and is not assembled: step, place of the prompt in it, and its rollouts.

        Prompts that lack samples are left out, and what a server should not have sent; nobody has judged them.
        """
        for step, asks in self._asked.items():
            for number, ask in enumerate(asks):
                samples = ask.arrived()
                if samples and self._misfit(samples) is None:
                    place = self._rank + number * self._ranks
                    yield step, place, [self._rollout(ask.prompt, sample) for sample in samples]

    def close(self) -> None:
        """Drop what was asked for and not collected: that aborts it."""
        self._asked.clear()

    def _send(self, step: int) -> None:
        for ask in self._asked[step]:
            ask.send(self._draw)

    def _draw(self, prompt: StepPrompt, min_weight_version: int, on_sample: Callable[[Sample], None]) -> PendingSamples:
        if self._episodes is not None:
            return self._episodes.submit(
                prompt,
                self._sampling,
                num_samples=self._samples_per_prompt,
                min_weight_version=min_weight_version,
                on_sample=on_sample,
            )
        return self._service.submit(
            prompt.token_ids,
            self._sampling,
            num_samples=self._samples_per_prompt,
            seed=prompt.seed,
            min_weight_version=min_weight_version,
            images=prompt.images,
            on_sample=on_sample,
        )

    def _has_asked_late_again(self, step: int) -> bool:
        """Whether there was something to ask for; each time, another request has been answered since the last."""
        if not self._asks_late_again:
            return False
        late = [ask for ask in self._asked[step] if isinstance(ask.failure(), DeadlineExpired)]
        answered = [ask.arrived_s for asks in self._asked.values() for ask in asks if ask.is_answered]
        if not late or max(*answered, self._complete_s, 0.0) <= max(ask.sent_s for ask in late):
            return False
        log.warning("samples are late behind others, so they are asked for again", extra={"requests": len(late)})
        for ask in late:
            ask.pending, ask.sent_s = None, time.perf_counter()
        self._send(step)
        return True

    def _drawing_s(self, asks: Sequence[_Ask]) -> float:
        if not asks:
            return 0.0
        began_s = max(self._complete_s, min(ask.asked_s for ask in asks))
        self._complete_s = max(ask.arrived_s for ask in asks)
        return max(0.0, self._complete_s - began_s)

    def _misfit(self, samples: Sequence[Sample]) -> str | None:
        """Why these are not what was asked for; None: they are."""
        most = max((end - first for sample in samples for first, end in spans_of(sample)), default=0)
        if len(samples) == self._samples_per_prompt and most <= self._sampling.max_new_tokens:
            return None
        return (
            f"a rollout server sent {len(samples)} samples of up to {most} tokens; it was asked for "
            f"{self._samples_per_prompt} of at most {self._sampling.max_new_tokens}"
        )

    def _rollout(self, prompt: StepPrompt, sample: Sample) -> Rollout:
        if self._read is None:
            return Rollout.of(
                prompt.token_ids,
                sample,
                teacher_prompt_ids=prompt.teacher_ids,
                teacher_name=prompt.teacher_name,
                images=prompt.images,
                teacher_images=prompt.teacher_images,
            )
        rollout = Rollout.of(prompt.token_ids, sample)
        return replace(rollout, sequence=self._read(prompt, rollout.sequence))

    def _rollouts(self, prompts: Sequence[StepPrompt], share: Share, rank: int) -> list[Rollout]:
        each = [prompt for prompt in prompts for _ in range(self._samples_per_prompt)]
        rollouts = [self._rollout(prompt, sample) for prompt, sample in zip(each, samples_of(share), strict=True)]
        if digest([rollout.sequence for rollout in rollouts]) != share.digest:
            raise EngineFailure(
                f"the tokens that rank {rank} sampled are not those that rank {self._rank} has from it; "
                "every rank must have the same prompts in the same order"
            )
        if not share.verdicts:
            return rollouts
        return [rollout.judged(verdict) for rollout, verdict in zip(rollouts, share.verdicts, strict=True)]


class _Ask:
    """One prompt at the rollout servers."""

    def __init__(
        self,
        prompt: StepPrompt,
        min_weight_version: int,
        on_sample: Callable[[TokenSequence], None],
        rollout: Callable[[StepPrompt, Sample], Rollout],
        judge: Judge | None,
    ) -> None:
        self._rollout = rollout
        self._judge = judge
        self._verdicts: dict[tuple[bytes, FinishReason], Future[Verdict]] = {}  # the last on each response
        self.prompt = prompt
        self.samples: list[Sample] = []  # when they are here
        self.verdicts: list[Verdict] = []  # on them; empty: nobody judges
        self.pending: PendingSamples | None = None  # while they are not
        self.asked_s = self.arrived_s = time.perf_counter()  # the first time; the last sample
        self.sent_s = self.asked_s  # the last time that it was late, if it was
        self._min_weight_version = min_weight_version
        self._on_sample = on_sample

    @property
    def is_done(self) -> bool:
        """Whether `collect` would not block."""
        is_here = self.pending is None or self.pending.is_done
        return is_here and all(verdict.done() for verdict in self._verdicts.values())

    @property
    def is_answered(self) -> bool:
        """Whether all samples are here."""
        return bool(self.samples) or (self.pending is not None and self.pending.is_done and self.failure() is None)

    def arrived(self) -> list[Sample]:
        """The samples, if all of them are here; does not block."""
        if self.samples or self.pending is None or not self.is_answered:
            return self.samples
        return self.pending.wait()

    def failure(self) -> RpcError | None:
        """Why `collect` would raise or say that servers are too old; it is done."""
        try:
            if self.pending is not None:
                self.pending.wait()
        except RpcError as error:
            return error
        return None

    def send(self, draw: Callable[[StepPrompt, int, Callable[[Sample], None]], PendingSamples]) -> None:
        """Ask, unless there are samples already, or will be."""
        if not self.samples and self.pending is None:
            self.pending = draw(self.prompt, self._min_weight_version, self._tell)

    def collect(self) -> str:
        """Block for the samples; why every server is too old, or nothing."""
        if self.pending is None:
            return ""
        pending, self.pending = self.pending, None
        try:
            self.samples = pending.wait()
        except ModelMismatch as error:
            return str(error)
        if self._judge is not None:
            self.verdicts = [self._verdicts[_response(sample)].result() for sample in self.samples]
        return ""

    def _tell(self, sample: Sample) -> None:
        self.arrived_s = time.perf_counter()
        if self._judge is None:
            self._pass_on(sample)
            return

        def pass_on_what_counts(verdict: Verdict) -> None:
            if verdict.weight > 0:
                self._pass_on(sample)

        # Whoever collects waits for what is passed on too: when the step is planned it is too late to be early.
        self._verdicts[_response(sample)] = self._judge.submit(self.prompt, sample, pass_on_what_counts)

    def _pass_on(self, sample: Sample) -> None:
        [sequence] = teacher_side([self._rollout(self.prompt, sample).sequence])
        self._on_sample(sequence)


def _response(sample: Sample) -> tuple[bytes, FinishReason]:
    return sample.token_ids.tobytes(), sample.finish_reason
