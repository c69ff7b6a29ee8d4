"""What is sampled from the student, and who samples it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from kdmesh.chats.chat_rows import Message
from kdmesh.errors import EnvironmentFailed
from kdmesh.types import FinishReason, Float32Array, Int32Array, PlacedImage, Sample, Sampling, TokenSequence
from kdmesh_trainer.data.encoding.sides import Aligned, InChunks, InContext, addressed, aligned_rows
from kdmesh_trainer.stats import RolloutFigures


class PendingSamples(Protocol):
    """The samples of one prompt, which were asked for."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        ...

    def wait(self) -> list[Sample]:
        """Block until all samples are here, in the order of their seeds. Called once.

        Raises:
            ModelMismatch: every server that answers has weights that are older than the request wants.
            RpcError: they will not come; the step cannot be finished.
        """
        ...


class RolloutService(Protocol):
    """Where samples come from. Dropping what `submit` returns aborts the request."""

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        min_weight_version: int,
        images: tuple[PlacedImage, ...],
        on_sample: Callable[[Sample], None],
    ) -> PendingSamples:
        """Ask for samples of one prompt, sample i drawn from seed + i. Does not block.

        Args:
            on_sample: called in any thread with each sample as it comes; must not block, nor raise.
        """
        ...

    def wait(self, pending: Iterable[Any]) -> bool:
        """Block until all of what `submit` returned is done; False when a server has older weights than were noted."""
        ...

    def note_weights(self, version: int, *, behind: Collection[str]) -> None:
        """Every server but those at the addresses `behind` serves this version now."""
        ...

    def outdated(self) -> frozenset[str]:
        """Addresses of servers that are known to have older weights than were noted."""
        ...


class WeightPublisher(Protocol):
    """Brings the student's weights to those who sample from it."""

    def publish(self, *, version: int) -> None:
        """Have every server that is there serve the student as it is now, after `version` steps. Collective.

        Raises:
            StepLost: none took it within the deadline, or one refused it.
        """
        ...

    def catch_up(self, among: Collection[str]) -> None:
        """Bring what was published last, which the student must still be, to servers that lack it. Collective.

        Args:
            among: addresses of servers that were found to lack it; the same on every rank.

        Raises:
            StepLost: one refused it.
        """
        ...

    @property
    def behind(self) -> frozenset[str]:
        """Addresses of servers that are known to lack what was published last; the same on every rank."""
        ...

    def weight_version(self, version: int) -> int:
        """The number that servers know the student by which was published last, after `version` steps.

        The numbers only rise, also when a run goes back to an earlier step.
        """
        ...


class EpisodeEnd(StrEnum):
    """Why an episode ended."""

    ENVIRONMENT = "environment"  # it said so
    TURNS = "turns"  # the student has had as many as it may
    LENGTH = "length"  # a turn was cut, or no other one has room behind it
    TEMPLATE = "template"  # writes earlier turns otherwise than they were drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Which tokens of an episode the student drew, and why there are no more."""

    spans: tuple[tuple[int, int], ...]  # [first, one past the last) of each turn, in order; what is between was given
    end: EpisodeEnd

    @property
    def num_given(self) -> int:
        """Tokens between turns."""
        return self.spans[-1][1] - sum(end - first for first, end in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode(Sample):
    """The student's turns with what it was answered between them; it begins and ends with a turn.

    Log-probabilities are 0 where a token was given. `finish_reason` is STOP where the environment has ended it. Weight
    versions are those of the oldest and of the newest turn.
    """

    turns: Turns
    messages: tuple[Message, ...] = ()  # with those of the prompt, and the last turn at the end; empty: another rank's

    @classmethod
    def of(cls, sample: Sample, turns: Turns, messages: tuple[Message, ...] = ()) -> Episode:
        """The tokens of a sample that are such an episode."""
        own = {each.name: getattr(sample, each.name) for each in fields(Sample)}
        return cls(**own, turns=turns, messages=messages)


def spans_of(sample: Sample) -> tuple[tuple[int, int], ...]:
    """Of the tokens that the student drew, turn by turn, as Turns has them."""
    return sample.turns.spans if isinstance(sample, Episode) else ((0, sample.num_tokens),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge says of one sample."""

    weight: float  # of its tokens' loss, finite, >= 0; 0 leaves it out
    is_right: bool | None = None  # None: that is not asked
    error: str = ""  # why the judge failed on it, and it is left out; empty: it did not


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """A prompt with one response, or an episode; every token that was drawn carries loss, and nothing was appended."""

    sequence: TokenSequence
    logprobs: Float32Array  # [R] of each drawn token, at temperature 1
    is_cut_off: bool  # ended at a limit of length
    weight_version: int  # of its first token; of an episode, the oldest of its turns' first ones
    turns: Turns | None = None  # of an episode; None: it is one response
    verdict: Verdict | None = None  # None: nobody judges

    @property
    def counts(self) -> bool:
        """Whether it is trained on."""
        return self.verdict is None or self.verdict.weight > 0

    def judged(self, verdict: Verdict) -> Rollout:
        """The same with its weight, if it has one."""
        sequence = replace(self.sequence, weight=verdict.weight) if verdict.weight > 0 else self.sequence
        return replace(self, sequence=sequence, verdict=verdict)

    @classmethod
    def of(
        cls,
        prompt_ids: Int32Array,
        sample: Sample,
        *,
        teacher_prompt_ids: Int32Array | None = None,
        teacher_name: str = "",
        images: tuple[PlacedImage, ...] = (),
        teacher_images: tuple[PlacedImage, ...] = (),
    ) -> Rollout:
        """The sample after its prompt, and for the teacher after another one if there is one.

        Args:
            images: of the prompt.
            teacher_images: of the teacher's other one.
            teacher_name: of the one of several that is asked.
        """
        sequence = _after(prompt_ids, sample, images)
        if teacher_prompt_ids is not None:
            sequence = InContext(
                token_ids=sequence.token_ids,
                positions=sequence.positions,
                images=images,
                teacher=_after(teacher_prompt_ids, sample, teacher_images),
            )
        return cls(
            sequence=addressed(sequence, teacher_name) if teacher_name else sequence,
            logprobs=np.concatenate([sample.logprobs[first:end] for first, end in spans_of(sample)]),
            is_cut_off=sample.finish_reason is FinishReason.LENGTH,
            weight_version=sample.min_weight_version,
            turns=sample.turns if isinstance(sample, Episode) else None,
        )


def _after(prompt_ids: Int32Array, sample: Sample, images: tuple[PlacedImage, ...]) -> TokenSequence:
    before = len(prompt_ids) - 1
    spans = [np.arange(before + first, before + end, dtype=np.int32) for first, end in spans_of(sample)]
    return TokenSequence(
        token_ids=np.concatenate([prompt_ids, sample.token_ids]), positions=np.concatenate(spans), images=images
    )


def refuse_unanswerable(step: int, rollouts: Sequence[Rollout]) -> None:
    """Raises EnvironmentFailed when all episodes of a step have ended because of the chat template."""
    ends = [rollout.turns.end for rollout in rollouts if rollout.turns is not None]
    if ends and all(end is EpisodeEnd.TEMPLATE for end in ends):
        raise EnvironmentFailed(
            f"all {len(ends)} episodes of step {step} ended because the chat template writes earlier turns otherwise "
            "than the student drew them, by leaving out its reasoning for example: `source.environment.history: drawn` "
            "goes on from what was drawn; or give a data.chat_template that keeps it"
        )


def figures_of(
    rollouts: Sequence[Rollout], staleness: Sequence[int], *, waits_s: Sequence[float], drawing_s: float
) -> RolloutFigures:
    """The figures of one step.

    Args:
        staleness: of each rollout, in steps.
        waits_s: of each rank.
        drawing_s: of the rank that took longest.
    """
    lengths = [rollout.sequence.num_rows for rollout in rollouts]
    return RolloutFigures(
        response_tokens=sum(lengths),
        response_tokens_mean=sum(lengths) / len(lengths),
        response_tokens_max=max(lengths),
        cut_off_fraction=sum(rollout.is_cut_off for rollout in rollouts) / len(rollouts),
        staleness_steps_mean=sum(staleness) / len(staleness),
        staleness_steps_max=max(staleness),
        sampling_wait_s=sum(waits_s) / len(waits_s),
        sampling_s=drawing_s,
        aligned_fraction=_aligned_fraction([rollout.sequence for rollout in rollouts]),
        **_judgement([rollout.verdict for rollout in rollouts if rollout.verdict is not None]),
        **_episodes([rollout.turns for rollout in rollouts if rollout.turns is not None]),
    )


def _episodes(episodes: Sequence[Turns]) -> dict[str, Any]:
    """The figures of an environment; empty: there is none."""
    if not episodes:
        return {}
    ended = {f"ended_by_{end}_fraction": sum(one.end is end for one in episodes) / len(episodes) for end in EpisodeEnd}
    return {
        "episode_turns_mean": sum(len(one.spans) for one in episodes) / len(episodes),
        "environment_fraction": sum(one.num_given for one in episodes) / sum(one.spans[-1][1] for one in episodes),
        **ended,
    }


def _judgement(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The figures of a judge; empty: there is none."""
    if not verdicts:
        return {}
    known = [verdict.is_right for verdict in verdicts if verdict.is_right is not None]
    return {
        "sample_weight_mean": sum(verdict.weight for verdict in verdicts) / len(verdicts),
        "left_out_fraction": sum(verdict.weight == 0 for verdict in verdicts) / len(verdicts),
        "right_fraction": sum(known) / len(known) if known else None,
        "judge_errors": sum(bool(verdict.error) for verdict in verdicts),
    }


def _aligned_fraction(sequences: Sequence[TokenSequence]) -> float | None:
    """None where all tokens are the teacher's too."""
    if not any(isinstance(sequence, Aligned | InChunks) for sequence in sequences):
        return None
    return sum(map(aligned_rows, sequences)) / sum(sequence.num_rows for sequence in sequences)
