"""A pair group in a thread of its own, for an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from kdmesh.errors import Unavailable
from kdmesh.groups.pair_group import PairGroup

T = TypeVar("T")

_JOIN_S = 60.0  # many times what gloo takes at most; NCCL has no deadline of its own for connecting two that have come


class PairChannel:
    """Belongs to the event loop that made it. Whoever is cancelled while it waits breaks the group."""

    def __init__(self, join: Callable[[], PairGroup], *, within_s: float = _JOIN_S) -> None:
        """Begin to join.

        Args:
            join: blocks, and raises Unavailable.
            within_s: how long it is waited for; one that ends later leaves its group at once.
        """
        self._within_s = within_s
        self._until_s = time.monotonic() + within_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="group of two")
        self._joining = asyncio.get_running_loop().run_in_executor(self._thread, join)
        self._joining.add_done_callback(_look_at)
        self._is_closed = False

    async def joined(self) -> PairGroup:
        """The group. Raises Unavailable when there is none, or none in time."""
        try:
            async with asyncio.timeout(max(0.0, self._until_s - time.monotonic())):
                return await asyncio.shield(self._joining)
        except TimeoutError:
            raise Unavailable(f"no group of two was made within {self._within_s:g} s") from None

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
