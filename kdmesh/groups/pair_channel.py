"""A pair group in a thread of its own, for an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from kdmesh.errors import Unavailable
from kdmesh.groups.pair_group import PairGroup

T = TypeVar("T")


class PairChannel:
    """Belongs to the event loop that made it. Whoever is cancelled while it waits breaks the group."""

    def __init__(self, join: Callable[[], PairGroup]) -> None:
        """Begin to join. `join` blocks, for a few seconds at most, and raises Unavailable."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="group of two")
        self._joining = asyncio.get_running_loop().run_in_executor(self._thread, join)
        self._joining.add_done_callback(_look_at)
        self._is_closed = False

    async def joined(self) -> PairGroup:
        """The group. Raises Unavailable when there is none."""
        return await asyncio.shield(self._joining)

    async def send(self, data: memoryview, timeout_s: float) -> None:
        """See PairGroup. However it ends, nobody reads `data` any more then."""
        group = await self.joined()
        await self._run(group, group.send, data, timeout_s)

    async def receive(self, place: Tensor, timeout_s: float) -> None:
        """See PairGroup. However it ends, nobody writes to `place` any more then."""
        group = await self.joined()
        await self._run(group, group.receive, place, timeout_s)

    def abort(self) -> None:
        """Break the group: who sends or receives gets Unavailable."""
        if self._joining.done() and not self._joining.cancelled() and self._joining.exception() is None:
            self._joining.result().abort()

    async def close(self) -> None:
        """Leave the group and end the thread; one that still joins ends with its time, and leaves then."""
        if not self._joining.done():
            self._joining.add_done_callback(_leave)
        elif self._joining.exception() is None:
            group = self._joining.result()
            group.abort()
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, group.close))
        self._is_closed = True
        self._thread.shutdown(wait=False)

    async def _run(self, group: PairGroup, call: Callable[..., T], *args: object) -> T:
        if self._is_closed:  # between two pieces of one answer
            raise Unavailable("the group was left", retry_after_s=0.0)
        running = asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            group.abort()
            await asyncio.wait([running])
            _look_at(running)
            raise


def _look_at(done: asyncio.Future[T]) -> None:
    """Nobody else may."""
    if not done.cancelled():
        done.exception()


def _leave(joining: asyncio.Future[PairGroup]) -> None:
    if not joining.cancelled() and joining.exception() is None:
        joining.result().close()
