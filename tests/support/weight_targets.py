"""A model's weights in memory, in place of an engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdmesh.types import DType
from kdmesh.weights.manifest import Manifest, TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Weights
from kdmesh.weights.staging import StagedTensors

FINGERPRINT = "f" * 32


class MemoryTarget:
    """Keeps what was committed.

    Attributes:
        served: tensors by name; empty until the first commit.
        version: what `commit` was told.
        staged: the second copy; None outside an update.
        threads: names of the threads that called.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.served: dict[str, Tensor] = {}
        self.version = 0
        self.staged: StagedTensors | None = None
        self.threads: set[str] = set()
        self._specs = tuple(specs)

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """As given."""
        return self._specs

    def begin(self) -> None:
        """Make room."""
        assert self.staged is None
        self.staged = StagedTensors(self._specs)

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy."""
        assert self.staged is not None
        self.threads.add(threading.current_thread().name)
        self.staged.write(tensor, offset_bytes, data)

    def commit(self, version: int) -> None:
        """Serve the copy."""
        assert self.staged is not None
        self.served, self.version, self.staged = self.staged.tensors, version, None

    def discard(self) -> None:
        """Drop the copy."""
        self.staged = None


def random_weights(
    shapes: dict[str, tuple[int, ...]], *, seed: int, dtype: DType = DType.BFLOAT16
) -> dict[TensorSpec, Tensor]:
    """A tensor for each shape, in order, of any bits that are finite numbers."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        spec = TensorSpec(name=name, shape=shape, dtype=dtype)
        octets = torch.randint(0, 256, (spec.size_bytes,), dtype=torch.uint8, generator=generator)
        weights[spec] = octets.view(getattr(torch, dtype.value)).reshape(shape).nan_to_num()
    return weights


def makers_of(weights: Mapping[TensorSpec, Tensor]) -> Weights:
    """The same tensors, as a sender takes them."""
    return [(spec, lambda tensor=tensor: tensor) for spec, tensor in weights.items()]  # type: ignore[misc]


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and bits, NaN or not."""
    octets = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*octets)


def manifest_of(
    specs: Sequence[TensorSpec], *, version: int = 1, policy: UpdatePolicy = UpdatePolicy.FINISH
) -> Manifest:
    """An update of all of them."""
    return Manifest(version=version, architecture_fingerprint=FINGERPRINT, tensors=tuple(specs), policy=policy)
