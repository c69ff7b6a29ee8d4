"""Segments that are written once and read by every session: output heads."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from kdmesh.errors import HandleGone
from kdmesh.handles.ledger import Key
from kdmesh.handles.memory import Segment, create_segment_in_thread
from kdmesh.types import DType, Handle

_EPOCH = 1  # their memory is never replaced
_ALIGNMENT_BYTES = 4096  # good for vector loads, and for registering with a device
_COPY_STEP_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A row-major matrix to be shared."""

    data: memoryview  # contiguous, rows * cols * dtype.size_bytes bytes
    rows: int
    cols: int
    dtype: DType


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    segment: Segment
    handles: tuple[Handle, ...]


class SharedSegments:
    """Numbered from `first_number` on; they live until `close`."""

    def __init__(self, first_number: int) -> None:
        self._first_number = first_number
        self._all: list[_Shared] = []

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(shared.segment.size_bytes for shared in self._all)

    async def add(self, matrices: Sequence[Matrix]) -> tuple[Handle, ...]:
        """Copy matrices to one new segment. Raises OSError when there is not enough memory."""
        sizes = [-(-matrix.data.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for matrix in matrices]
        *offsets, size_bytes = [0, *itertools.accumulate(sizes)]
        segment = await create_segment_in_thread(size_bytes)
        handles = tuple(
            Handle(
                segment=self._first_number + len(self._all),
                epoch=_EPOCH,
                token=secrets.token_bytes(16),
                offset_bytes=offset,
                rows=matrix.rows,
                cols=matrix.cols,
                dtype=matrix.dtype,
            )
            for matrix, offset in zip(matrices, offsets, strict=True)
        )
        # Listed before it is filled, so that it is closed whatever happens; nobody knows the handles yet.
        self._all.append(_Shared(segment=segment, handles=handles))
        for matrix, handle in zip(matrices, handles, strict=True):
            assert matrix.data.nbytes == handle.size_bytes
            await asyncio.to_thread(_copy, matrix.data.cast("B"), segment.writable[handle.offset_bytes :])
        return handles

    def find(self, key: Key) -> tuple[Segment, Handle]:
        """Where the handle points, and how it was answered. Raises HandleGone."""
        index = key.segment - self._first_number
        if 0 <= index < len(self._all) and key.epoch == _EPOCH:
            for handle in self._all[index].handles:
                if hmac.compare_digest(handle.token, key.token):
                    return self._all[index].segment, handle
        raise HandleGone(f"the handle to shared segment {key.segment} is of another server, or forged")

    def close(self) -> None:
        """Give the memory up; readers keep what they have mapped."""
        for shared in self._all:
            shared.segment.close()


def _copy(source: memoryview, target: memoryview) -> None:
    for start in range(0, len(source), _COPY_STEP_BYTES):  # in steps: an assignment keeps the interpreter lock
        step = source[start : start + _COPY_STEP_BYTES]
        target[start : start + len(step)] = step
