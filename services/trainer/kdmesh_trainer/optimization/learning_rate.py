"""The learning rate, a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal, assert_never

from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.rate_config import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Polynomial,
    RateConfig,
    WarmupStableDecay,
)


def learning_rate(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`, counted from 0.

    Rises linearly from 0 so that the first step after warm-up has the peak, then goes as the schedule says; what falls
    to final_fraction of the peak reaches it in the last step.
    """
    warmup = config.warmup_of(steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    height = _height(config.schedule, since_peak=step - warmup, last=steps - 1 - warmup, warmup=warmup, steps=steps)
    if isinstance(config.schedule, InverseSqrt):
        return config.learning_rate * height
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * height)


def _height(schedule: RateConfig, *, since_peak: int, last: int, warmup: int, steps: int) -> float:
    """From 1 at the peak to 0 in the last step, but for schedules that do not fall to an end.

    Args:
        since_peak: steps since the first one after warm-up.
        last: those of the last step.
    """
    progress = since_peak / last if last > 0 else 0.0
    match schedule:
        case Cosine():
            return _shape("cosine", progress)
        case Linear():
            return _shape("linear", progress)
        case Polynomial():
            return float((1 - progress) ** schedule.power)
        case WarmupStableDecay():
            decay = schedule.decay_of(steps)
            return _shape(schedule.shape, max(0.0, 1 - (last - since_peak) / decay))
        case InverseSqrt():
            timescale = schedule.timescale or max(1, warmup)
            return math.sqrt(timescale / (timescale + since_peak))
        case Constant():
            return 1.0
        case _:
            assert_never(schedule)


def _shape(name: Literal["1-sqrt", "linear", "cosine"], progress: float) -> float:
    """1 at progress 0, 0 at progress 1."""
    match name:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "1-sqrt":
            return 1 - math.sqrt(progress)
        case _:
            assert_never(name)
