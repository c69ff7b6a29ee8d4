"""The optimizer, as a trainer's configuration says."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from kdmesh.config import StrictModel

Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictModel):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the two moments."""

    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; norms and biases are exempt."""

    moments: Literal["float32", "8bit"] = "float32"
    """How the two moments of a weight are kept: in 8 bytes, or in blocks of 256 with a scale each, in 2. 8bit needs
    kdmesh[eightbit]."""

    max_gradient_norm: float | None = Field(1.0, gt=0)
    """Clips the global norm; null leaves gradients as they are."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After warm-up, the way down to final_fraction of the peak."""

    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from 0."""

    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step, as a fraction of the peak."""
