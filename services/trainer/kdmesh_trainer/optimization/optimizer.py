"""The optimizer over the student's shards: AdamW, or Muon with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from torch import Tensor, nn
from torch.optim import Optimizer

from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.optimization.muon import build_muon

if TYPE_CHECKING:
    from kdmesh_trainer.sections.optimizer_config import OptimizerConfig


def check_optimizer(config: OptimizerConfig) -> None:
    """Load what `optimizer_over` will need. Raises ConfigError when it is not installed."""
    if config.moments == "8bit":
        import kdmesh_trainer.optimization.eight_bit  # noqa: F401  # not at the top: it needs an extra


def optimizer_over(
    student: nn.Module, config: OptimizerConfig, *, algorithm: nn.Module | None = None, rate_factor: float = 1.0
) -> Optimizer:
    """What `config` names; arguments and errors as build_adamw."""
    match config.name:
        case "adamw":
            return build_adamw(student, config, algorithm=algorithm, rate_factor=rate_factor)
        case "muon":
            return build_muon(student, config, algorithm=algorithm, rate_factor=rate_factor)
        case _:
            assert_never(config.name)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The next update has this rate, times the factor of each group."""
    for group in optimizer.param_groups:
        own = rate * group["rate_factor"]
        if isinstance(group["lr"], Tensor):  # of an update that is compiled, which must not be compiled anew
            group["lr"].fill_(own)
        else:
            group["lr"] = own
