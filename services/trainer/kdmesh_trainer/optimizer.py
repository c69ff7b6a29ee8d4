"""AdamW over the student's shards, with a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, assert_never

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kdmesh_trainer.rate_config import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Polynomial,
    RateConfig,
    WarmupStableDecay,
)
from kdmesh_trainer.shards import own_shard

if TYPE_CHECKING:
    from kdmesh_trainer.optimizer_config import OptimizerConfig


def check_optimizer(config: OptimizerConfig) -> None:
    """Load what `build_adamw` will need. Raises ConfigError when it is not installed."""
    if config.moments == "8bit":
        import kdmesh_trainer.eight_bit  # noqa: F401  # not at the top: it needs an extra


def build_adamw(
    student: nn.Module, config: OptimizerConfig, *, algorithm: nn.Module | None = None, rate_factor: float = 1.0
) -> Optimizer:
    """AdamW over every parameter that is trained; vectors (norms, biases) do not decay.

    Call it after the student is sharded: sharding replaces the parameters.

    Args:
        algorithm: a part of `student` that does not decay either.
        rate_factor: its learning rate is this times that of the rest.

    Raises:
        ConfigError: `config.moments` needs what is not installed.
    """
    beside = [] if algorithm is None else list(algorithm.parameters())
    apart = {id(p) for p in beside}
    trained = [p for p in student.parameters() if p.requires_grad and id(p) not in apart]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay, "rate_factor": 1.0},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "rate_factor": 1.0},
        {"params": [p for p in beside if p.requires_grad], "weight_decay": 0.0, "rate_factor": rate_factor},
    ]
    used = [group for group in groups if group["params"]]
    match config.moments:
        case "float32":
            return _ShardedAdamW(used, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
        case "8bit":
            from kdmesh_trainer.eight_bit import eight_bit_adamw

            return eight_bit_adamw(used, config)
        case _:
            assert_never(config.moments)


class _ShardedAdamW(AdamW):
    """Updates shards as the plain tensors that they are.

    By way of DTensor, finding out that each of them may be updated where it lies takes the host longer than the update.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = [own_shard(tensor) for tensor in tensors]
        return has_complex


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The next update has this rate, times the factor of each group."""
    for group in optimizer.param_groups:
        own = rate * group["rate_factor"]
        if isinstance(group["lr"], Tensor):  # of an update that is compiled, which must not be compiled anew
            group["lr"].fill_(own)
        else:
            group["lr"] = own


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
