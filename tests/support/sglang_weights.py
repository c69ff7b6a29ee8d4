"""Sends a student's weights to a rollout server, as a trainer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.models.fingerprint import architecture_fingerprint, named_weights
from kdmesh.models.placement import DTYPES
from kdmesh.rpc.weight_sender import WeightSender
from kdmesh.weights.doors import DoorChoice
from kdmesh.weights.manifest import TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Weights


def publish(
    address: str,
    model: PreTrainedModel,
    version: int,
    *,
    door: DoorChoice = "auto",
    policy: UpdatePolicy = UpdatePolicy.FINISH,
    weights: Callable[[PreTrainedModel], Weights] | None = None,
) -> None:
    """Return when the server serves this version."""
    with WeightSender([address], door=door, bucket_bytes=2**16, deadline_s=60) as sender:
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


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DTYPES[tensor.dtype])


def _maker(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
