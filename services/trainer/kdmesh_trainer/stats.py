"""The figures of one step or one evaluation, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFigures:
    """The samples of one step, over all ranks; equal on every rank."""

    response_tokens: int  # of all samples
    response_tokens_mean: float
    response_tokens_max: int
    cut_off_fraction: float  # of samples that ended at a limit of length
    staleness_steps_mean: float  # updates of the student between a sample's first token and its use
    staleness_steps_max: int
    sampling_wait_s: float  # mean over ranks of the time spent waiting for samples
    sampling_s: float  # that drawing them took, on the rank that had to wait for longest; waited for or not
    aligned_fraction: float | None = None  # of response tokens that the teacher's are compared with; None: all
    sample_weight_mean: float | None = None  # None: nobody judges
    left_out_fraction: float | None = None  # of samples whose weight is 0
    right_fraction: float | None = None  # of samples that are right; None: nobody knows
    judge_errors: int | None = None  # samples on which the judge failed, which are left out
    episode_turns_mean: float | None = None  # of the student; None, as those below: nobody answers it
    environment_fraction: float | None = None  # of the tokens behind prompts that were given, not drawn
    ended_by_environment_fraction: float | None = None  # of episodes; these four add up to 1
    ended_by_turns_fraction: float | None = None
    ended_by_length_fraction: float | None = None
    ended_by_template_fraction: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """How the student that is trained sees the tokens that were sampled; equal on every rank.

    With d = log p_sampler - log p_student of a token, at temperature 1, k1 is the mean of d and k3 that of
    exp(-d) - 1 + d; both estimate KL(sampler || student), which is 0 where the sampler has the student's weights.
    Source: Schulman, "Approximating KL Divergence" (2020).
    """

    sampler_kl_k1_nats: float | None  # None: the objective knows no token's probability
    sampler_kl_k3_nats: float | None  # >= 0
    student_entropy_nats: float | None  # at the objective's temperature; None: the objective does not compute it
    teacher_entropy_nats: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFigures:
    """One of several teachers in one step; equal on every rank."""

    tokens: int  # of the sequences that it was asked for, over all ranks
    loss_tokens: int  # of them
    wait_s: float  # mean over ranks of the time spent waiting for its rows, once those of teachers before it were here


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one optimizer step measured, before its update; equal on every rank."""

    loss_nats_per_token: float | None  # what was minimised; None: nothing had weight, and the step changed nothing
    divergence_nats_per_token: float | None  # None: the objective has no teacher
    cross_entropy_nats_per_token: float | None  # None: the objective does not compute it
    top1_agreement: float | None  # fraction of loss tokens where student and teacher prefer the same token
    topk_overlap: float | None = (
        None  # part of the teacher's k likeliest tokens among the student's; None: not asked for
    )
    layer_distance: float | None = None  # mean over loss tokens and pairs of layers; None: no layers are compared
    gradient_norm: float | None  # before clipping; None where there is no loss
    learning_rate: float
    num_loss_tokens: int
    num_tokens: int  # loss tokens and all others
    teacher_wait_s: float  # mean over ranks of the time spent waiting for rows
    teacher_age_steps: int | None = None  # steps since the teacher got the student's weights; None: it is frozen
    rollouts: RolloutFigures | None = None  # None: nothing was sampled
    samples: SampleScores | None = None  # None: nothing was sampled
    teachers: Mapping[str, TeacherFigures] = field(default_factory=dict)  # by name; empty unless there are several
    datasets: Mapping[str, int] = field(default_factory=dict)  # sequences of each one of a blend; empty: it is none

    def figures(self) -> dict[str, float | None]:
        """Every figure by its name, in one level; a teacher's age, the distance of layers, what is aligned and what a
        judge or an environment says only where there is such.
        """
        figures = asdict(self)
        for name in ("teacher_age_steps", "layer_distance"):
            if figures[name] is None:
                del figures[name]
        rollouts, samples, teachers, datasets = (
            figures.pop(name) for name in ("rollouts", "samples", "teachers", "datasets")
        )
        sampled = {name: value for name, value in (rollouts or {}).items() if value is not None}
        each = {f"teacher_{key}.{name}": value for name, own in teachers.items() for key, value in own.items()}
        drawn = {f"dataset_sequences.{name}": count for name, count in datasets.items()}
        return {**figures, **sampled, **(samples or {}), **each, **drawn}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How the student does on held-out data; per-token averages over all of it, equal on every rank."""

    kl_nats_per_token: float | None  # KL(teacher || student) at temperature 1; None without a teacher
    cross_entropy_nats_per_token: float
    top1_agreement: float | None  # None without a teacher
    num_loss_tokens: int
    num_sequences: int
    datasets: Mapping[str, Scores] = field(default_factory=dict)  # of each of several datasets; empty: it is one

    def figures(self) -> dict[str, float | None]:
        """Every figure by its name, in one level; those of several datasets with their names behind."""
        whole = {**asdict(self), "perplexity": self.perplexity}
        del whole["datasets"]
        apart = {
            f"{key}.{name}": value for name, scores in self.datasets.items() for key, value in scores.figures().items()
        }
        return {**whole, **apart}

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy; infinite where that overflows."""
        try:
            return math.exp(self.cross_entropy_nats_per_token)
        except OverflowError:
            return math.inf
