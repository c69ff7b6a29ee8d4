"""Starts the processes of an engine again when one of them has died."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kdmesh.errors import EngineFailure, KdmeshError
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.thread import EngineThread

log = logging.getLogger(__name__)

_REFUSAL = "the server's engine died; ask again in a while, or elsewhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """How often an engine's processes may be started again."""

    restarts: int  # within the window; 0: their death ends the server
    window_s: float


class Mortal(Protocol):
    """An engine that works in processes of its own."""

    @property
    def restart_limits(self) -> RestartLimits:
        """How often others may take their place."""
        ...

    def watch(self, on_death: Callable[[str], None]) -> None:
        """From now on call `on_death` from some thread, with a reason, when one of them dies, or has died already.

        Called once after each start of theirs.
        """
        ...

    def restart(self) -> None:
        """End them, and start others of the same model, which know nothing yet. On the engine's thread.

        Raises:
            KdmeshError: they do not start, or do not compute what they must.
        """
        ...


class Work(Protocol):
    """A server's scheduler."""

    async def run(self) -> None:
        """Work until cancelled. Raises EngineFailure when the engine is dead or broken; whoever waits has been told."""
        ...

    def engine_died(self, reason: str) -> None:
        """Let `run` raise EngineFailure."""
        ...

    def engine_is_replaced(self) -> None:
        """Another takes the dead engine's place, so `run` may be called again."""
        ...


class Revival:
    """Runs the scheduler of a server whose engine has processes. Belongs to the server's event loop."""

    def __init__(
        self,
        engine: Mortal,
        thread: EngineThread,
        work: Work,
        gate: Gate[Any],
        *,
        before: Callable[[str], Awaitable[None]],
        after: Callable[[], Awaitable[None]],
    ) -> None:
        """
        Args:
            before: lets fail what uses the dead engine, for the reason that it is given; returns when nothing does.
            after: returns when the server has brought the new processes to where the old ones were, and they compute
                as they must.
        """
        self._engine = engine
        self._thread = thread
        self._work = work
        self._gate = gate
        self._before = before
        self._after = after
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
                await self._work.run()
            except EngineFailure as failure:
                self._gate.pause(self, _REFUSAL)
                await self._revive(failure)
                self._gate.resume(self)

    def _died(self, reason: str) -> None:
        self._gate.pause(self, _REFUSAL)
        self._work.engine_died(reason)

    async def _revive(self, failure: KdmeshError) -> None:
        """Return when the engine computes again."""
        while True:
            self._count_restart(failure)
            log.warning("engine is started again", extra={"reason": str(failure)})
            began_s = time.monotonic()
            try:
                await self._before(_REFUSAL)
                # Whatever dies from now on is a new death.
                self._work.engine_is_replaced()
                await self._thread.run(self._engine.restart)
                self._engine.watch(self._on_death)
                await self._after()
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


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[str], None], reason: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, reason)
