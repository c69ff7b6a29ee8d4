"""New weights on their way into SGLang's scheduler processes, which map the memory that the server fills.

SGLang's own update of weights, which orders it among requests and lets all processes of the model take part, carries
nothing but our loader's name. Each process loads its part of every tensor from that memory, as it does from files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdmesh.handles.slab.memory import Segment
from kdmesh.sglang.file_names import file_tensors
from kdmesh.sglang.segments import Segments
from kdmesh.types import DType
from kdmesh.weights.buckets import ALIGNMENT_BYTES
from kdmesh.weights.manifest import TensorSpec

SEGMENTS = Segments()
"""What this process, when it is a scheduler, has mapped of the server's memory."""

LOADER = "kdmesh.sglang.staged_weights.load"
"""For SGLang's custom_weight_loader."""

_SIZE_BYTES = 8  # of the number that says how long the table is


class StagedWeights:
    """A second copy of a model's weights, in memory that the schedulers map too; what lies where stands before it."""

    def __init__(self, specs: Sequence[TensorSpec], segment: Segment) -> None:
        self._bytes = np.frombuffer(segment.writable, np.uint8)
        self._specs = specs
        table = _table(specs)
        segment.writable[: len(table)] = table
        self._offsets = _offsets(specs, len(table))

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy bytes to tensor number `tensor`, without the interpreter lock."""
        begin = self._offsets[tensor] + offset_bytes
        np.copyto(self._bytes[begin : begin + len(data)], np.frombuffer(data, np.uint8))

    def tensor_bytes(self, tensor: int) -> memoryview:
        """Of tensor number `tensor`, read-only."""
        begin = self._offsets[tensor]
        return self._bytes[begin : begin + self._specs[tensor].size_bytes].data.toreadonly()


def staged_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size of the segment."""
    return _offsets(specs, len(_table(specs)))[-1]


def read_staged(mapping: mmap) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by its name; a view of the memory."""
    size_bytes = int.from_bytes(mapping[:_SIZE_BYTES], "little")
    table = json.loads(mapping[_SIZE_BYTES : _SIZE_BYTES + size_bytes])
    specs = [TensorSpec(name=name, shape=tuple(shape), dtype=DType(dtype)) for name, shape, dtype in table]
    offsets = _offsets(specs, _SIZE_BYTES + size_bytes)
    for spec, offset in zip(specs, offsets[:-1], strict=True):
        count = spec.size_bytes // spec.dtype.size_bytes
        flat = torch.frombuffer(mapping, dtype=getattr(torch, spec.dtype.value), count=count, offset=offset)
        yield spec.name, flat.view(spec.shape)


def load(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Called by SGLang in each scheduler process; `named_tensors`, which would come through its messages, is empty."""
    from sglang.srt.managers import mm_schedule

    assert not named_tensors
    staged = dict(read_staged(SEGMENTS.weights()))
    model.load_weights(own for name, tensor in staged.items() for own in file_tensors(name, tensor, staged))
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()  # SGLang 0.5.23 keeps what the old weights saw in images


def _table(specs: Sequence[TensorSpec]) -> bytes:
    table = json.dumps([[spec.name, list(spec.shape), spec.dtype.value] for spec in specs]).encode()
    return len(table).to_bytes(_SIZE_BYTES, "little") + table


def _offsets(specs: Sequence[TensorSpec], table_bytes: int) -> list[int]:
    """Where each tensor begins behind the table, aligned; and where the last one ends."""
    offsets = [_aligned(table_bytes)]
    for spec in specs:
        offsets.append(_aligned(offsets[-1] + spec.size_bytes))
    return offsets


def _aligned(offset_bytes: int) -> int:
    return -(-offset_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
