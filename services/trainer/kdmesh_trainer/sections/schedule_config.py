"""When and how a run is judged, and when it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.questions_config import QuestionsConfig
from kdmesh_trainer.sections.rollouts_config import RolloutsConfig

if TYPE_CHECKING:
    from kdmesh_trainer.config import TrainerConfig


_MOST_STEPS = 99_999_999  # names of checkpoints have eight digits


class EvaluationConfig(StrictModel):
    """On held-out data, and by questions; both also before the first step and after the last."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations; null evaluates only at the start and the end."""

    max_sequences: int | None = Field(None, ge=1)
    """Only this many held-out sequences, of each dataset of several, from the first on; null takes all."""

    questions: QuestionsConfig | None = None
    """Questions that the student answers (docs/evaluation.md); null asks none."""

    rollouts: RolloutsConfig | None = None
    """Rollout servers that answer the questions of a run which is not on-policy; they get the student before each
    evaluation, and serve this job alone."""


class CheckpointConfig(StrictModel):
    """Saved state for resuming."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; null saves only when stopped and at the end."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""


def refuse_idle_evaluation(cfg: TrainerConfig) -> None:
    """Raises ValueError when evaluations are configured that have nothing to judge by."""
    asked = cfg.evaluation
    if asked.every is not None and cfg.data.held_out is None and asked.questions is None:
        raise ValueError(
            f"evaluation.every ({asked.every}) has nothing to judge by: give data.held_out or evaluation.questions, "
            "or leave it out"
        )
    if asked.max_sequences is not None and cfg.data.held_out is None:
        raise ValueError(f"evaluation.max_sequences ({asked.max_sequences}) needs data.held_out, which it bounds")


def unfit_length(cfg: TrainerConfig, steps: int) -> str | None:
    """Why a run cannot have so few steps, or so many; None: it can."""
    if steps > _MOST_STEPS:
        return f"steps ({steps}) must be no more than {_MOST_STEPS}"
    if (why := cfg.optimizer.too_short(steps)) is not None:
        return why
    if cfg.profile is not None and (step := max(cfg.profile.steps)) >= steps:
        return f"profile.steps has {step}; steps are counted from 0, and the last is {steps - 1}"
    return None
