"""Starts the processes of an engine again when one of them has died."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from kdmesh.errors import EngineFailure, KdmeshError
from kdmesh.handles.store import SlabStore
from kdmesh.serving.engine_thread import EngineThread
from kdmesh.serving.gate import Gate
from kdmesh.serving.sleep import Sleep
from kdmesh_teacher.engine import ProcessEngine
from kdmesh_teacher.scheduler import Scheduler

log = logging.getLogger(__name__)

_REFUSAL = "the server's engine died; ask again in a while, or elsewhere"


class Revival:
    """Runs the scheduler of a server whose engine has processes. Belongs to the server's event loop."""

    def __init__(
        self,
        engine: ProcessEngine,
        thread: EngineThread,
        scheduler: Scheduler,
        store: SlabStore,
        sleep: Sleep,
        gate: Gate[Any],
        *,
        check: Callable[[], None],
    ) -> None:
        """
        Args:
            check: blocks on the engine's thread; raises when the engine does not compute as it must.
        """
        self._engine = engine
        self._thread = thread
        self._scheduler = scheduler
        self._store = store
        self._sleep = sleep
        self._gate = gate
        self._check = check
        self._restarted_at_s: deque[float] = deque()
        loop = asyncio.get_running_loop()
        self._on_death = lambda reason: _tell(loop, self._died, reason)
        engine.watch(self._on_death)

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            EngineFailure: the engine died, or does not compute, and may not be started again.
        """
        while True:
            try:
                await self._scheduler.run()
            except EngineFailure as failure:
                self._gate.pause(self, _REFUSAL)
                await self._revive(failure)
                self._gate.resume(self)

    def _died(self, reason: str) -> None:
        self._gate.pause(self, _REFUSAL)
        self._scheduler.engine_died(reason)

    async def _revive(self, failure: KdmeshError) -> None:
        """Return when the engine computes again."""
        while True:
            self._count_restart(failure)
            log.warning("engine is started again", extra={"reason": str(failure)})
            began_s = time.monotonic()
            try:
                await self._start()
            except KdmeshError as error:
                failure = error
                continue
            log.info("engine computes again", extra={"seconds": time.monotonic() - began_s})
            return

    def _count_restart(self, failure: KdmeshError) -> None:
        """Raises EngineFailure when there were enough."""
        limits, now_s = self._engine.restart_limits, time.monotonic()
        while self._restarted_at_s and now_s - self._restarted_at_s[0] > limits.window_s:
            self._restarted_at_s.popleft()
        if limits.restarts == 0:
            raise EngineFailure(str(failure)) from failure
        if len(self._restarted_at_s) >= limits.restarts:
            raise EngineFailure(
                f"{failure}; the engine was started again {limits.restarts} times within {limits.window_s:g} s, which "
                "is the most allowed"
            ) from failure
        self._restarted_at_s.append(now_s)

    async def _start(self) -> None:
        # First: whatever dies from now on is a new death.
        self._scheduler.engine_is_replaced()
        await self._thread.run(self._engine.restart)
        self._engine.watch(self._on_death)
        # The new processes can write no memory that was sealed before they were there.
        await self._store.replace_memory()
        await self._thread.run(self._check)
        if self._sleep.asleep:
            await self._thread.run(self._engine.sleep, self._sleep.asleep)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[str], None], reason: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, reason)
