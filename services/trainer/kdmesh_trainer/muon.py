"""Muon: matrices move by their momentum made orthogonal, everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from kdmesh_trainer.optimizer import ShardedAdamW, parameter_groups
from kdmesh_trainer.optimizer_config import OptimizerConfig
from kdmesh_trainer.shards import like_shard, own_part, own_shard
from kdmesh_trainer.weights import whole

# X <- a X + (b X X^T + c (X X^T)^2) X brings singular values between about 0.7 and 1.2 in so many steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_LEAST_NORM = 1e-7
_RMS = 0.2  # of an update's elements, as AdamW's mostly have it


def build_muon(
    student: nn.Module, config: OptimizerConfig, *, algorithm: nn.Module | None = None, rate_factor: float = 1.0
) -> Optimizer:
    """Muon over the matrices of the student's layers, and AdamW over the rest; arguments as build_adamw.

    AdamW has embeddings, the output head, vectors, tensors of more dimensions (as experts that lie in one), and the
    algorithm's own parameters.
    """
    matrices = _matrices(student, algorithm)
    groups = [
        {**group, "params": params, "is_orthogonal": is_orthogonal, "momentum": config.momentum}
        for group in parameter_groups(student, config, algorithm=algorithm, rate_factor=rate_factor)
        for is_orthogonal in (True, False)
        if (params := [p for p in group["params"] if (id(p) in matrices) is is_orthogonal])
    ]
    return Muon(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


class Muon(ShardedAdamW):
    """AdamW, but for groups that are to be orthogonal.

    B <- m B + (1 - m) G, then W <- (1 - rate * decay) W - rate * 0.2 sqrt(max(rows, columns)) * O, where O is
    (1 - m) G + m B with all singular values near 1. Each rank gathers one matrix at a time, and works out all of O,
    which shards cannot; it updates its own part.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon (O, with Nesterov's momentum); Liu et al. 2025,
    arXiv:2502.16982, equation 4 (decay, and the scale that has AdamW's learning rates serve).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads
        """One update. Collective."""
        loss: float | None = super().step(closure)
        for group in self.param_groups:
            if group["is_orthogonal"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        return False if group["is_orthogonal"] else super()._init_group(group, *lists)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rate, momentum = self.state[parameter], group["lr"], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, average = own_shard(gradient), own_shard(state["momentum_buffer"])
        average.lerp_(gradient, 1 - momentum)
        direction = orthogonal(whole(like_shard(gradient.lerp(average, momentum), parameter), None))
        size = _RMS * math.sqrt(max(direction.shape))
        own = own_shard(parameter)
        own.mul_(1 - rate * group["weight_decay"]).add_(own_part(direction, parameter), alpha=-rate * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors, all of whose singular values are near 1 that are not near 0.

    Computed in bfloat16 on a GPU, as Muon is, and in float32 on a CPU, which is faster there.
    """
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=_LEAST_NORM)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.T if is_tall else x).to(matrix.dtype)


def _matrices(student: nn.Module, algorithm: nn.Module | None) -> set[int]:
    """The ids of parameters that turn vectors into vectors, and are not of tokens."""
    others = set() if algorithm is None else {id(parameter) for parameter in algorithm.parameters()}
    for module in student.modules():
        if isinstance(module, nn.Embedding):
            others |= {id(parameter) for parameter in module.parameters()}
        if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
            others |= {id(parameter) for parameter in head.parameters()}
    return {id(parameter) for parameter in student.parameters() if parameter.ndim == 2} - others
