"""AdamW whose moments take a byte each, from torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from kdmesh.errors import ConfigError

try:
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit
except ImportError as error:
    raise ConfigError(f"optimizer.moments 8bit needs torchao (pip install 'kdmesh[eightbit]'): {error}") from error

if TYPE_CHECKING:
    from kdmesh_trainer.sections.optimizer_config import OptimizerConfig

# torchao makes its tables of values once: now, because it cannot while tensors have no memory, as in a plan.
for _is_signed in (True, False):
    OptimState8bit.zeros((256,), _is_signed)


class EagerAdamW8bit(AdamW8bit):  # type: ignore[misc]  # torchao has no types
    """The same update, not compiled: on a CPU a compiler would take longer than most runs."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update."""
        with torch.compiler.set_stance("force_eager"):
            loss: float | None = super().step(closure)
        return loss


def eight_bit_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """AdamW over `groups`, compiled on a GPU.

    A moment of less than 4096 values on a rank, or of a number of them that is no multiple of 256, stays in float32.

    Source: Dettmers et al. 2022, arXiv:2110.02861, sections 2.1 (blocks) and 2.2 (the table of values).
    """
    is_on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
    kind = AdamW8bit if is_on_gpu else EagerAdamW8bit
    optimizer: Optimizer = kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon)
    return optimizer
