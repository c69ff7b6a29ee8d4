"""Sends a student's weights to a server, as a trainer does."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.models.fingerprint import architecture_fingerprint, named_weights
from kdmesh.models.placement import DTYPES
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.rpc.weights.services import ROLLOUTS, WeightService
from kdmesh.weights.doors import DoorChoice
from kdmesh.weights.manifest import AdapterSpec, LowRankSpec, TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Changes, Weights


def publish(
    address: str,
    model: PreTrainedModel,
    version: int,
    *,
    door: DoorChoice = "auto",
    policy: UpdatePolicy = UpdatePolicy.FINISH,
    weights: Callable[[PreTrainedModel], Weights] | None = None,
    service: WeightService = ROLLOUTS,
) -> None:
    """Return when the server serves this version."""
    with WeightSender([address], service=service, door=door, bucket_bytes=2**16, deadline_s=150) as sender:
        sender.publish(version, architecture_fingerprint(model), (weights or all_weights)(model), policy)


def all_weights(model: PreTrainedModel) -> Weights:
    """Every tensor."""
    return [(_spec(name, tensor), _maker(tensor)) for name, tensor in named_weights(model).items()]


def failing_weights(model: PreTrainedModel) -> Weights:
    """Every tensor, but the last cannot be made."""
    *others, (spec, _) = all_weights(model)

    def fail() -> Any:
        raise ConnectionAbortedError("the sender is interrupted")

    return [*others, (spec, fail)]


def random_changes(model: PreTrainedModel, *, seed: int, part: str) -> Changes:
    """Of every matrix that has `part` in its name; of low rank, and not small."""
    random = torch.Generator().manual_seed(seed)
    specs, factors = [], list[tuple[TensorSpec, Callable[[], Tensor]]]()
    for name, tensor in named_weights(model).items():
        if part in name:
            specs.append(LowRankSpec(tensor=name, rank=4, scaling=0.5))
            for spec in specs[-1].factors(tuple(tensor.shape)):
                factors.append((spec, _maker(0.3 * torch.randn(spec.shape, generator=random))))
    return Changes(adapter=AdapterSpec(base=bytes(16), changes=tuple(specs)), factors=factors)


@torch.no_grad()
def changed(model: PreTrainedModel, changes: Changes) -> PreTrainedModel:
    """A copy of the model with the changes added."""
    copy = deepcopy(model)
    made = {spec.name: make() for spec, make in changes.factors}
    weights = named_weights(copy)
    for change in changes.adapter.changes:
        a, b = (made[f"{change.tensor}.{side}"] for side in "ab")
        weights[change.tensor].copy_(weights[change.tensor].float() + change.scaling * b @ a)
    return copy


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DTYPES[tensor.dtype])


def _maker(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
