"""Memory of this process for matrices that are copied, used again once the last view of a tensor has died."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import numpy.typing as npt

_Buffer = npt.NDArray[np.uint8]
_MAX_SPARES = 8
_MAX_SPARE_BYTES = 256 * 2**20


class SpareBuffers:
    """Used again, because the first touch of a page costs ten times as much as the copy."""

    def __init__(self) -> None:
        self._spares: list[_Buffer] = []  # finalizers append in any thread; only the loop takes out

    def __len__(self) -> int:
        """How many wait to be used."""
        return len(self._spares)

    def take(self, size_bytes: int) -> tuple[ctypes.Array[ctypes.c_char], memoryview]:
        """What a tensor is to be made over, and its first `size_bytes` bytes, to be written until then."""
        buffer = self._fitting(size_bytes)
        exporter = (ctypes.c_char * buffer.nbytes).from_buffer(buffer.data)
        if buffer.nbytes <= _MAX_SPARE_BYTES:
            weakref.finalize(exporter, self._spares.append, buffer).atexit = False
        return exporter, buffer.data[:size_bytes]

    def clear(self) -> None:
        """Give up what waits."""
        self._spares.clear()

    def _fitting(self, size_bytes: int) -> _Buffer:
        del self._spares[:-_MAX_SPARES]
        fitting = [(spare.nbytes, i) for i, spare in enumerate(self._spares) if spare.nbytes >= size_bytes]
        if fitting:
            return self._spares.pop(min(fitting)[1])
        if self._spares:
            del self._spares[0]  # one that is too small makes room for a larger one
        return np.empty(size_bytes * 5 // 4, np.uint8)
