"""Tensors whose rows come as a stream of float8 with a scale for each row, and are rounded by that."""

from __future__ import annotations

from torch import Tensor

from kdmesh.errors import EngineFailure, Unavailable
from kdmesh.handles import fp8
from kdmesh.handles.doors.door import matrix_over
from kdmesh.handles.doors.stream import StreamDoor
from kdmesh.types import Handle


class Fp8Door(StreamDoor):
    """Half the bytes of 16-bit rows; see kdmesh.handles.fp8 for what it costs.

    The tensor has the handle's own type and shape. What must come as it is, like a head, needs another door.

    Args:
        read: the chunks of a handle as float8, in order. It raises HandleGone and Unavailable.
        release: called when the bytes have arrived or never will; must not block.
    """

    name = "stream_fp8"

    async def fetch(self, handle: Handle) -> Tensor:
        """See Door."""
        if self._is_closed:
            raise Unavailable("the stream door is closed")
        exporter, _ = self._spares.take(handle.size_bytes)
        rows_RD = matrix_over(exporter, handle, offset_bytes=0)
        begin = 0
        try:
            async for chunk in self._read(handle):
                if self._is_closed:
                    raise Unavailable("the stream door was closed")
                begin += fp8.decode(chunk, rows_RD[begin:])
        finally:
            self._release(handle)
        if begin != handle.rows:
            raise EngineFailure(f"the stream of a handle to {handle.rows} rows brought {begin}")
        return rows_RD
