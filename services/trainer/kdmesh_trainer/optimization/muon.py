"""Muon: matrices move by their momentum made orthogonal, everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from kdmesh_trainer.optimization.adamw import ShardedAdamW, holds_vectors, parameter_groups
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.shards import like_shard, own_shard

# X <- a X + (b X X^T + c (X X^T)^2) X brings singular values between about 0.7 and 1.2 in so many steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_LEAST_NORM = 1e-7
_RMS = 0.2  # of an update's elements, as AdamW's mostly have it


def build_muon(
    student: nn.Module, config: OptimizerConfig, *, algorithm: nn.Module | None, rate_factor: float
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
    (1 - m) G + m B with all singular values near 1. Shards cannot say O, so ranks that share a copy of the student take
    turns: of as many matrices as they are, each has one whole and works out its O, of which all get their own part.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon (O, with Nesterov's momentum); Liu et al. 2025,
    arXiv:2502.16982, equation 4 (decay, and the scale that has AdamW's learning rates serve).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads
        """One update. Collective."""
        loss: float | None = super().step(closure)
        moved = [
            (parameter, group)
            for group in self.param_groups
            if group["is_orthogonal"]
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # Neighbours take about as long, so that no rank waits long for the others.
        moved.sort(key=lambda each: each[0].numel() * min(each[0].shape), reverse=True)
        ranks = _sharing_ranks(moved[0][0]) if moved else 1
        for first in range(0, len(moved), ranks):
            turn = moved[first : first + ranks]
            averages = [self._averaged(parameter, group["momentum"]) for parameter, group in turn]
            for (parameter, group), direction in zip(turn, _orthogonal_parts(averages), strict=True):
                size = _RMS * math.sqrt(max(parameter.shape))
                own = own_shard(parameter)
                own.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * size)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        return False if group["is_orthogonal"] else super()._init_group(group, *lists)

    def _averaged(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """What is to be made orthogonal, spread as the parameter is."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, average = own_shard(parameter.grad), own_shard(state["momentum_buffer"])
        average.lerp_(gradient, 1 - momentum)
        return like_shard(gradient.lerp(average, momentum), parameter)


def _sharing_ranks(tensor: Tensor) -> int:
    return tensor.device_mesh.size(-1) if isinstance(tensor, DTensor) else 1


def _orthogonal_parts(matrices: list[Tensor]) -> list[Tensor]:
    """This rank's rows of what `orthogonal` makes of each of the matrices. Collective.

    Args:
        matrices: spread alike by rows, as many as ranks that share a copy of the student, or fewer; or a whole one.
    """
    first = matrices[0]
    if not isinstance(first, DTensor):
        return [orthogonal(matrix) for matrix in matrices]
    mesh, ranks = first.device_mesh, _sharing_ranks(first)
    place, group = mesh.get_local_rank(-1), mesh.get_group(-1)
    parts = [own_shard(matrix) for matrix in matrices]
    given = [part.numel() for part in parts] + [0] * (ranks - len(parts))
    shape = matrices[place].shape if place < len(matrices) else (0, 0)
    each = -(-shape[0] // ranks)
    taken = [shape[1] * max(min(each, shape[0] - rank * each), 0) for rank in range(ranks)]
    sent = torch.cat([part.flatten() for part in parts])
    own = sent.new_empty(sum(taken))
    dist.all_to_all_single(own, sent, taken, given, group=group)
    if len(own):
        own = orthogonal(own.view(shape)).flatten()
    dist.all_to_all_single(sent, own, given, taken, group=group)
    return [part.view_as(like) for part, like in zip(torch.split(sent, given)[: len(parts)], parts, strict=True)]


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
    own = {id(p) for name, p in student.named_parameters() if p.ndim == 2 and not holds_vectors(name, p)}
    return own - others
