"""AdamW over the student's shards, with a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, assert_never

from torch import nn
from torch.optim import AdamW

if TYPE_CHECKING:
    from kdmesh_trainer.optimizer_config import OptimizerConfig


def build_adamw(
    student: nn.Module, config: OptimizerConfig, *, algorithm: nn.Module | None = None, rate_factor: float = 1.0
) -> AdamW:
    """AdamW over every parameter that is trained; vectors (norms, biases) do not decay.

    Call it after the student is sharded: sharding replaces the parameters.

    Args:
        algorithm: a part of `student` that does not decay either.
        rate_factor: its learning rate is this times that of the rest.
    """
    beside = [] if algorithm is None else list(algorithm.parameters())
    apart = {id(p) for p in beside}
    trained = [p for p in student.parameters() if p.requires_grad and id(p) not in apart]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay, "rate_factor": 1.0},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "rate_factor": 1.0},
        {"params": [p for p in beside if p.requires_grad], "weight_decay": 0.0, "rate_factor": rate_factor},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`, counted from 0.

    Rises linearly from 0 so that the first step after warm-up has the peak, then falls to
    final_fraction of it, reached in the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    way = steps - 1 - config.warmup_steps
    progress = (step - config.warmup_steps) / way if way > 0 else 0.0
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * _height(config, progress))


def _height(config: OptimizerConfig, progress: float) -> float:
    """1 at progress 0, 0 at progress 1, but for the constant schedule."""
    match config.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0
        case _:
            assert_never(config.schedule)
