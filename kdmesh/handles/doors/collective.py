"""Tensors whose bytes come through a private group of this process and the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from torch import Tensor

from kdmesh.errors import Unavailable
from kdmesh.handles.buffers import SpareBuffers
from kdmesh.handles.doors.door import matrix_over
from kdmesh.types import Handle


class Group(Protocol):
    """This process and the server."""

    async def receive(self, handle: Handle, place: memoryview) -> None:
        """Fill `place` with the handle's bytes. However it ends, nobody writes there any more then.

        Raises as Door.fetch. Whatever is raised: the group is of no use any more.
        """
        ...

    def leave(self) -> None:
        """Use it no more; who receives gets Unavailable. Does not wait for anybody."""
        ...


class CollectiveDoor:
    """Fetches one matrix after the other. A group that broke is left at once, and another one made for the next fetch.

    Args:
        join: makes a group. It raises HandleGone and Unavailable.
        release: called when the bytes have arrived or never will; must not block.
    """

    name = "collective"

    def __init__(self, join: Callable[[], Awaitable[Group]], release: Callable[[Handle], None]) -> None:
        self._join = join
        self._release = release
        self._group: Group | None = None
        self._turn = asyncio.Lock()
        self._is_closed = False
        self._spares = SpareBuffers()

    async def open(self) -> None:
        """Make the first group. Raises as `join`."""
        self._group = await self._join()

    async def fetch(self, handle: Handle) -> Tensor:
        """See Door."""
        try:
            async with self._turn:
                exporter, view = self._spares.take(handle.size_bytes)
                await self._receive(handle, view)
        finally:
            self._release(handle)
        return matrix_over(exporter, handle, offset_bytes=0)

    def forget(self, handle: Handle) -> None:
        """See Door. Nothing is kept of it."""

    def close(self) -> None:
        """See Door."""
        self._is_closed = True
        self._spares.clear()
        self._leave()

    async def _receive(self, handle: Handle, place: memoryview) -> None:
        if self._is_closed:
            raise Unavailable("the collective door is closed")
        if self._group is None:
            self._group = await self._join()
        try:
            await self._group.receive(handle, place)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.leave()
