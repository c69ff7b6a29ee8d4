"""A second copy of a model's weights in ordinary memory, while it arrives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdmesh.weights.manifest import TensorSpec


class StagedTensors:
    """For engines: `write` is that of a WeightTarget; its first touch of the memory is slow, so reuse it if you can."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        """Allocate."""
        self._tensors = {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.value)) for spec in specs}
        self._bytes = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in self._tensors.values()]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        return self._tensors

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy bytes to tensor number `tensor`, without the interpreter lock."""
        np.copyto(self._bytes[tensor][offset_bytes : offset_bytes + len(data)], np.frombuffer(data, np.uint8))
