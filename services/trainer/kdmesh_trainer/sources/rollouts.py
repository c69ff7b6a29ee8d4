"""What is sampled from the student, and who samples it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from kdmesh.types import FinishReason, Float32Array, Int32Array, PlacedImage, Sample, Sampling, TokenSequence
from kdmesh_trainer.data.sides import Aligned, InChunks, InContext, addressed, aligned_rows
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
            RpcError: none took it within the deadline, or one refused it.
        """
        ...

    def catch_up(self, among: Collection[str]) -> None:
        """Bring what was published last, which the student must still be, to servers that lack it. Collective.

        Args:
            among: addresses of servers that were found to lack it; the same on every rank.

        Raises:
            RpcError: one refused it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge says of one sample."""

    weight: float  # of its tokens' loss, finite, >= 0; 0 leaves it out
    is_right: bool | None = None  # None: that is not asked
    error: str = ""  # why the judge failed on it, and it is left out; empty: it did not


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """A prompt with one response; every token that was drawn carries loss, and nothing was appended."""

    sequence: TokenSequence
    logprobs: Float32Array  # [R] of each drawn token, at temperature 1
    is_cut_off: bool  # ended at a limit of length
    weight_version: int  # of its first token
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
            logprobs=sample.logprobs,
            is_cut_off=sample.finish_reason is FinishReason.LENGTH,
            weight_version=sample.min_weight_version,
        )


def _after(prompt_ids: Int32Array, sample: Sample, images: tuple[PlacedImage, ...]) -> TokenSequence:
    num_tokens = len(prompt_ids) + sample.num_tokens
    return TokenSequence(
        token_ids=np.concatenate([prompt_ids, sample.token_ids]),
        positions=np.arange(len(prompt_ids) - 1, num_tokens - 1, dtype=np.int32),
        images=images,
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
    )


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
