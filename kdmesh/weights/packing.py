"""Fills buckets with tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdmesh.errors import NotFinite
from kdmesh.weights import digests
from kdmesh.weights.buckets import BucketEntry, Part
from kdmesh.weights.finite import are_finite
from kdmesh.weights.manifest import AdapterSpec, TensorSpec

Weights: TypeAlias = Sequence[tuple[TensorSpec, Callable[[], Tensor]]]
"""Tensors in the order in which they are sent, each with what makes it: called once for each time it is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is to be added to some of the tensors that a server has or gets."""

    adapter: AdapterSpec
    factors: Weights  # a and b of every change


class Packer:
    """Copies tensors into buckets, in order; holds one of them at a time."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._held: int | None = None  # index of the tensor whose bytes are `_octets`
        self._octets = torch.empty(0, dtype=torch.uint8)

    def fill(self, bucket: memoryview, parts: Sequence[Part]) -> tuple[BucketEntry, ...]:
        """Put the parts in their places, and say what is there now. Blocks, mostly without the interpreter lock.

        Raises:
            NotFinite: a tensor is not, in the type that it is sent in.
        """
        return tuple(self._put(bucket, part) for part in parts)

    def _put(self, bucket: memoryview, part: Part) -> BucketEntry:
        source = self._octets_of(part.tensor)[part.tensor_offset_bytes :][: part.size_bytes]
        place = bucket[part.bucket_offset_bytes : part.end_bytes]
        if source.device.type == "cpu":
            entry = BucketEntry(part=part, digest=_copy(source.numpy(), np.frombuffer(place, np.uint8)))
        else:
            torch.frombuffer(place, dtype=torch.uint8).copy_(source)
            entry = BucketEntry(part=part, digest=digests.digest(place))
        spec, _ = self._weights[part.tensor]
        if not are_finite(place, spec.dtype):
            raise NotFinite(f"{spec.name} is not finite as {spec.dtype}, so the weights are not sent")
        return entry

    def _octets_of(self, index: int) -> Tensor:
        if self._held != index:
            self._octets = torch.empty(0, dtype=torch.uint8)  # let go of one tensor before the next is made
            spec, make = self._weights[index]
            tensor = make().detach()
            made = (tuple(tensor.shape), tensor.dtype)
            assert made == (spec.shape, getattr(torch, spec.dtype.value)), f"{spec} was announced, {made} made"
            self._octets = tensor.contiguous().reshape(-1).view(torch.uint8)
            self._held = index
        return self._octets


def _copy(source: npt.NDArray[np.uint8], place: npt.NDArray[np.uint8]) -> bytes:
    """Copy; the digest of what is there then."""
    running = digests.Running()
    for begin, end in digests.steps(len(source)):
        np.copyto(place[begin:end], source[begin:end])
        running.update(place[begin:end].data)
    return running.digest()
