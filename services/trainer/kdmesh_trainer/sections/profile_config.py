"""Which steps of a run are looked into."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from kdmesh.config import StrictModel


class ProfileConfig(StrictModel):
    """Traces of whole steps, of every operator and of every kernel; a step that is traced is slower than others."""

    steps: tuple[int, ...] = Field(min_length=1)
    """Which, counted from 0. The first ones compile and fill caches, and are like no other."""

    directory: Path | None = None
    """Where each rank writes a trace and a table of each; null: `profile` in the run's output."""

    shapes: bool = False
    """Write down the shapes of what operators get; makes traces larger."""

    memory: bool = False
    """Write down what is allocated and freed; makes traces larger."""

    stacks: bool = False
    """Write down which line called an operator; makes the step several times slower."""

    @model_validator(mode="after")
    def _are_steps(self) -> ProfileConfig:
        if min(self.steps) < 0:
            raise ValueError(f"steps has {min(self.steps)}: steps are counted from 0")
        return self
