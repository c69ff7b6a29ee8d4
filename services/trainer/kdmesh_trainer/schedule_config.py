"""When a run is judged, and when it is saved."""

from __future__ import annotations

from pydantic import Field

from kdmesh.config import StrictModel


class EvaluationConfig(StrictModel):
    """Held-out evaluation; it also runs before the first step and after the last."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations; null evaluates only at the start and the end."""

    max_sequences: int | None = Field(None, ge=1)
    """Only this many held-out sequences, from the first on; null takes all."""


class CheckpointConfig(StrictModel):
    """Saved state for resuming."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; null saves only when stopped and at the end."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""
