"""The optimizer, as a trainer's configuration says."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.rate_config import Constant, Cosine, InverseSqrt, RateConfig, WarmupStableDecay, share_of

Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictModel):
    """How the student is updated, and the schedule of its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon moves matrices by their momentum made orthogonal, and everything else as adamw does
    (docs/student_speed.md)."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's two moments."""

    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""

    momentum: Decay = 0.95
    """Of matrices, with muon."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; norms and biases are exempt."""

    moments: Literal["float32", "8bit"] = "float32"
    """How the two moments of a weight are kept: in 8 bytes, or in blocks of 256 with a scale each, in 2. 8bit needs
    kdmesh[eightbit]."""

    max_gradient_norm: float | None = Field(1.0, gt=0)
    """Clips the global norm; null leaves gradients as they are."""

    schedule: RateConfig = Cosine()
    """After warm-up, the way down to final_fraction of the peak: a name, or `{name: ..., ...}` (docs/schedule.md)."""

    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from 0."""

    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Instead of `warmup_steps`: a part of all steps, rounded up."""

    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step, as a fraction of the peak."""

    def warmup_of(self, steps: int) -> int:
        """Steps of warm-up of a run with so many; fewer than these."""
        if self.warmup_fraction == 0:
            return self.warmup_steps
        return min(share_of(steps, self.warmup_fraction), steps - 1)

    def too_short(self, steps: int) -> str | None:
        """Why a run cannot have so few steps; None: it can."""
        warmup = self.warmup_of(steps)
        if warmup >= steps:
            return f"optimizer.warmup_steps ({warmup}) must be less than steps ({steps})"
        if isinstance(self.schedule, WarmupStableDecay) and warmup + (decay := self.schedule.decay_of(steps)) > steps:
            return f"optimizer: warm-up ({warmup} steps) and decay ({decay}) must be no more than steps ({steps})"
        return None

    @model_validator(mode="after")
    def _has_an_effect(self) -> OptimizerConfig:
        if self.name == "adamw" and "momentum" in self.model_fields_set:
            raise ValueError("momentum is muon's; adamw has betas")
        if self.name == "muon" and self.moments != "float32":
            raise ValueError(f"moments {self.moments} does not go with muon")
        if self.warmup_steps > 0 and self.warmup_fraction > 0:
            raise ValueError("give warmup_steps or warmup_fraction, and not both")
        if isinstance(self.schedule, Constant | InverseSqrt) and "final_fraction" in self.model_fields_set:
            raise ValueError(f"schedule {self.schedule.name} goes nowhere by the last step: leave out final_fraction")
        has_warmup = self.warmup_steps > 0 or self.warmup_fraction > 0
        if isinstance(self.schedule, InverseSqrt) and self.schedule.timescale is None and not has_warmup:
            raise ValueError("schedule inverse_sqrt without warm-up needs its timescale")
        return self
