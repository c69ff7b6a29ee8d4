"""Segments that are written once and read by every session: output heads.

One that is out of date is retired: it stays for the sessions that were told of it, until they let go of it.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kdmesh.errors import HandleGone
from kdmesh.handles.key import Key
from kdmesh.handles.slab.memory import Segment, create_segment_in_thread
from kdmesh.types import DType, Handle

_EPOCH = 1  # their memory is never replaced
_ALIGNMENT_BYTES = 4096  # good for vector loads, and for registering with a device
_COPY_STEP_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a row-major matrix."""

    rows: int
    cols: int
    dtype: DType

    @property
    def size_bytes(self) -> int:
        """Bytes of the matrix."""
        return self.rows * self.cols * self.dtype.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix(Shape):
    """A matrix to be shared."""

    data: memoryview  # contiguous, size_bytes bytes


@dataclass(slots=True, kw_only=True, eq=False)
class _Shared:
    segment: Segment
    handles: tuple[Handle, ...]
    holds: set[tuple[Hashable, bytes]] = field(default_factory=set)  # who may still read which handle, by its token
    is_retired: bool = False


class SharedSegments:
    """Numbered from `first_number` on, no number twice; they live until they are retired and let go of, or `close`."""

    def __init__(self, first_number: int) -> None:
        self._numbers = itertools.count(first_number)
        self._all: dict[int, _Shared] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(shared.segment.size_bytes for shared in self._all.values())

    async def reserve(self, shapes: Sequence[Shape]) -> tuple[Handle, ...]:
        """A new segment with room for matrices, to be filled. Raises OSError when there is not enough memory."""
        sizes = [-(-shape.size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for shape in shapes]
        *offsets, size_bytes = [0, *itertools.accumulate(sizes)]
        segment = await create_segment_in_thread(size_bytes)
        number = next(self._numbers)
        handles = tuple(
            Handle(
                segment=number,
                epoch=_EPOCH,
                token=secrets.token_bytes(16),
                offset_bytes=offset,
                rows=shape.rows,
                cols=shape.cols,
                dtype=shape.dtype,
            )
            for shape, offset in zip(shapes, offsets, strict=True)
        )
        self._all[number] = _Shared(segment=segment, handles=handles)
        return handles

    async def fill(self, handles: Sequence[Handle], data: Sequence[memoryview]) -> None:
        """Copy the matrices of a segment that was reserved; nobody may have been told of the handles yet."""
        for handle, matrix in zip(handles, data, strict=True):
            assert matrix.nbytes == handle.size_bytes
            segment = self._all[handle.segment].segment
            await asyncio.to_thread(_copy, matrix.cast("B"), segment.writable[handle.offset_bytes :])

    async def add(self, matrices: Sequence[Matrix]) -> tuple[Handle, ...]:
        """Copy matrices to one new segment. Raises OSError when there is not enough memory."""
        handles = await self.reserve(matrices)
        await self.fill(handles, [matrix.data for matrix in matrices])
        return handles

    def find(self, key: Key) -> tuple[Segment, Handle]:
        """Where the handle points, and how it was answered. Raises HandleGone."""
        shared = self._all.get(key.segment)
        if shared is not None and key.epoch == _EPOCH:
            for handle in shared.handles:
                if hmac.compare_digest(handle.token, key.token):
                    return shared.segment, handle
        raise HandleGone(f"the handle to shared segment {key.segment} has ended, or is of another server, or forged")

    @contextmanager
    def reading(self, handle: Handle) -> Iterator[None]:
        """Around a read: the segment stays."""
        reader = object()
        self._hold(reader, (handle,))
        try:
            yield
        finally:
            self._let_go(reader, self._all[handle.segment], handle.token)

    def lend(self, session: bytes, handles: Sequence[Handle]) -> None:
        """A session is told of these handles of one segment, in place of any that it was told of before."""
        self.end_session(session)
        self._hold(session, handles)

    def release(self, session: bytes, key: Key) -> bool:
        """A session needs this handle no more; False, and nothing happens, when it was not told of it."""
        shared = self._all.get(key.segment)
        if shared is None or (session, key.token) not in shared.holds:
            return False
        self._let_go(session, shared, key.token)
        return True

    def end_session(self, session: bytes) -> None:
        """A session needs none of its handles any more."""
        for shared in tuple(self._all.values()):
            for handle in shared.handles:
                self._let_go(session, shared, handle.token)

    def retire(self, handles: Sequence[Handle]) -> None:
        """Nobody new is told of these handles, all of one segment."""
        shared = self._all[handles[0].segment]
        shared.is_retired = True
        self._drop_unused(shared)

    def close(self) -> None:
        """Give the memory up; readers keep what they have mapped."""
        for shared in self._all.values():
            shared.segment.close()

    def _hold(self, holder: Hashable, handles: Sequence[Handle]) -> None:
        for handle in handles:
            self._all[handle.segment].holds.add((holder, handle.token))

    def _let_go(self, holder: Hashable, shared: _Shared, token: bytes) -> None:
        shared.holds.discard((holder, token))
        self._drop_unused(shared)

    def _drop_unused(self, shared: _Shared) -> None:
        number = shared.handles[0].segment
        if shared.is_retired and not shared.holds and number in self._all:
            del self._all[number]
            shared.segment.close()


def _copy(source: memoryview, target: memoryview) -> None:
    for start in range(0, len(source), _COPY_STEP_BYTES):  # in steps: an assignment keeps the interpreter lock
        step = source[start : start + _COPY_STEP_BYTES]
        target[start : start + len(step)] = step
