"""Tensors whose bytes come as a stream of chunks, from any node."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import AsyncIterator, Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdmesh.errors import EngineFailure, Unavailable
from kdmesh.handles.door import matrix_over
from kdmesh.types import Handle

_Buffer = npt.NDArray[np.uint8]
_MAX_SPARES = 8
_MAX_SPARE_BYTES = 256 * 2**20


class StreamDoor:
    """Copies each matrix to a buffer that is used again once the last view of its tensor has died.

    Used again, because the first touch of a page costs ten times as much as the copy.

    Args:
        read: the chunks of a handle, in order. It raises HandleGone and Unavailable.
        release: called when the bytes have arrived or never will; must not block.
    """

    name = "stream"

    def __init__(self, read: Callable[[Handle], AsyncIterator[memoryview]], release: Callable[[Handle], None]) -> None:
        self._read = read
        self._release = release
        self._is_closed = False
        self._spares: list[_Buffer] = []  # finalizers append in any thread; only the loop takes out

    async def fetch(self, handle: Handle) -> Tensor:
        """See Door."""
        if self._is_closed:
            raise Unavailable("the stream door is closed")
        buffer = self._take(handle.size_bytes)
        exporter = (ctypes.c_char * buffer.nbytes).from_buffer(buffer.data)
        if buffer.nbytes <= _MAX_SPARE_BYTES:
            weakref.finalize(exporter, self._spares.append, buffer).atexit = False
        try:
            await self._fill(buffer.data[: handle.size_bytes], handle)
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

    def _take(self, size_bytes: int) -> _Buffer:
        del self._spares[:-_MAX_SPARES]
        fitting = [(spare.nbytes, i) for i, spare in enumerate(self._spares) if spare.nbytes >= size_bytes]
        if fitting:
            return self._spares.pop(min(fitting)[1])
        if self._spares:
            del self._spares[0]  # one that is too small makes room for a larger one
        return np.empty(size_bytes * 5 // 4, np.uint8)
