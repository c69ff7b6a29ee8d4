"""Tensors whose bytes come as a stream of chunks, from any node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from torch import Tensor

from kdmesh.errors import EngineFailure, Unavailable
from kdmesh.handles.buffers import SpareBuffers
from kdmesh.handles.doors.door import matrix_over
from kdmesh.types import Handle


class StreamDoor:
    """Copies each matrix to a buffer of this process.

    Args:
        read: the chunks of a handle, in order. It raises HandleGone and Unavailable.
        release: called when the bytes have arrived or never will; must not block.
    """

    name = "stream"

    def __init__(self, read: Callable[[Handle], AsyncIterator[memoryview]], release: Callable[[Handle], None]) -> None:
        self._read = read
        self._release = release
        self._is_closed = False
        self._spares = SpareBuffers()

    async def fetch(self, handle: Handle) -> Tensor:
        """See Door."""
        if self._is_closed:
            raise Unavailable("the stream door is closed")
        exporter, view = self._spares.take(handle.size_bytes)
        try:
            await self._fill(view, handle)
        finally:
            self._release(handle)
        return matrix_over(exporter, handle, offset_bytes=0)

    def forget(self, handle: Handle) -> None:
        """See Door. Nothing is kept of it."""

    def close(self) -> None:
        """See Door."""
        self._is_closed = True
        self._spares.clear()

    async def _fill(self, view: memoryview, handle: Handle) -> None:
        end = 0
        async for chunk in self._read(handle):
            begin, end = end, end + len(chunk)
            if self._is_closed:
                raise Unavailable("the stream door was closed")
            if end > len(view):
                break
            view[begin:end] = chunk
        if end != len(view):
            raise EngineFailure(f"the stream of a handle to {len(view)} bytes brought {end}")
