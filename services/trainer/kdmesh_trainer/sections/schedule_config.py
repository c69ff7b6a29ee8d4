"""When and how a run is judged, and when it is saved."""

from __future__ import annotations

from pydantic import Field

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.questions_config import QuestionsConfig
from kdmesh_trainer.sections.rollouts_config import RolloutsConfig


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
    """Steps between checkpoints; null leaves it to `minutes`. A run also saves when it is stopped, and at its end."""

    minutes: float | None = Field(30.0, gt=0)
    """Longest time that a run which is killed may lose: the step that ends after it saves, whatever `every` says;
    null: there is none."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""
