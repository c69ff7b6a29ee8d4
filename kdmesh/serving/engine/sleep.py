"""The sleep of a server: memory of the device that it gives back for a while, and what it refuses meanwhile.

AWAKE --sleep--> DRAINING --what runs is done--> ASLEEP --wake, the last tag--> AWAKE
  ^                 |  it takes too long          ^  |
  +-----------------+                             +--+ sleep or wake, other tags
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set
from typing import Any, Protocol

from kdmesh.errors import DeadlineExpired, InvalidRequest, Unavailable
from kdmesh.rpc.background_tasks import BackgroundTasks
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.engine.updating import Updating
from kdmesh.types import EVERY_TAG, SleepTag

log = logging.getLogger(__name__)

DRAIN_S = 60.0
"""How long what is being computed may take to finish when nobody says."""

_RETRY_S = 1.0  # nobody knows when it is woken


class Sleeper(Protocol):
    """An engine that can give memory back. Called from its thread while it computes nothing."""

    @property
    def sleep_refusal(self) -> str:
        """Why it cannot, as a sentence; empty: it can."""
        ...

    def sleep(self, tags: Set[SleepTag]) -> None:
        """Give these back, which it has. Raises Unavailable, and nothing has changed, when they cannot be kept."""
        ...

    def wake(self, tags: Set[SleepTag]) -> None:
        """Take these again, which it gave back: weights as they were, the cache empty.

        Raises:
            Unavailable: there is not enough memory; nothing has changed.
        """
        ...


class Pausable(Protocol):
    """Work that needs the engine, of which no new one comes."""

    def refuse_waiting(self, error: Unavailable) -> None:
        """Fail what has not begun."""
        ...

    async def wait_idle(self) -> None:
        """Return when nothing is under way."""
        ...


class WorkAndUpdates:
    """What needs the engine of a server whose weights are replaced: its work, and updates that are being received."""

    def __init__(self, work: Pausable, updating: Updating) -> None:
        self._work = work
        self._updating = updating

    def refuse_waiting(self, error: Unavailable) -> None:
        """Fail what has not begun."""
        self._work.refuse_waiting(error)

    async def wait_idle(self) -> None:
        """Return when no update is received, and nothing is under way."""
        await self._updating.wait_none()
        await self._work.wait_idle()


class Sleep:
    """One server's; belongs to its event loop. Calls take turns, and go on when their caller is gone."""

    def __init__(self, engine: Sleeper, thread: EngineThread, work: Pausable, gate: Gate[Any]) -> None:
        self._engine = engine
        self._thread = thread
        self._work = work
        self._gate = gate
        self._asleep: frozenset[SleepTag] = frozenset()
        self._turn = asyncio.Lock()
        self._tasks = BackgroundTasks()

    @property
    def asleep(self) -> frozenset[SleepTag]:
        """What is given back."""
        return self._asleep

    async def sleep(self, tags: Set[SleepTag], *, drain_s: float = DRAIN_S) -> frozenset[SleepTag]:
        """Give these back, after what is being computed; everything that is given back then.

        Raises:
            InvalidRequest: there is no tag, or the engine cannot sleep.
            Unavailable: there is nowhere to put the weights.
            DeadlineExpired: what was being computed took longer than `drain_s`.
        """
        _require(tags)
        if self._engine.sleep_refusal:
            raise InvalidRequest(self._engine.sleep_refusal)
        return await asyncio.shield(self._tasks.start(self._fall_asleep(tags, drain_s)))

    async def wake(self, tags: Set[SleepTag]) -> frozenset[SleepTag]:
        """Take these again; everything that is still given back then.

        Raises:
            InvalidRequest: there is no tag.
            Unavailable: there is not enough memory, or the engine is being started again, or the server ends.
        """
        _require(tags)
        return await asyncio.shield(self._tasks.start(self._wake_up(tags)))

    def require_weights(self) -> None:
        """For work that needs the weights and no cache. Raises Unavailable when they are given back, or about to be."""
        refusal = self._gate.refusal_of_others(self)
        if SleepTag.WEIGHTS in self._asleep or self._turn.locked():
            refusal = self._gate.refusal
        if refusal is not None:
            raise Unavailable(refusal, retry_after_s=_RETRY_S)

    def require_reachable(self) -> None:
        """For who says where servers are. Raises Unavailable when work is refused for another reason than sleep."""
        if (refusal := self._gate.refusal_of_others(self)) is not None:
            raise Unavailable(refusal, retry_after_s=_RETRY_S)

    async def sleep_again(self) -> None:
        """Let an engine that was started anew give back what the old one had given back."""
        if self._asleep:
            await self._thread.run(self._engine.sleep, self._asleep)

    async def _fall_asleep(self, tags: Set[SleepTag], drain_s: float) -> frozenset[SleepTag]:
        async with self._turn:
            giving = tags - self._asleep
            if not giving:
                return self._asleep
            reason = f"the server goes to sleep ({_names(self._asleep | tags)} given back); wake it"
            self._gate.pause(self, reason)
            try:
                self._work.refuse_waiting(Unavailable(reason, retry_after_s=_RETRY_S))
                async with asyncio.timeout(drain_s):
                    await self._work.wait_idle()
                await self._thread.run(self._engine.sleep, giving)
                self._asleep |= giving
            except TimeoutError:
                raise DeadlineExpired(
                    f"what was being computed did not finish within {drain_s:g} s, so the server is as before"
                ) from None
            finally:
                self._tell()
        log.info("asleep", extra={"tags": sorted(self._asleep)})
        return self._asleep

    async def _wake_up(self, tags: Set[SleepTag]) -> frozenset[SleepTag]:
        async with self._turn:
            waking = tags & self._asleep
            if waking:
                # An engine that is being started again has nothing to wake: it is put to sleep when it is there.
                if (refusal := self._gate.refusal_of_others(self)) is not None:
                    raise Unavailable(refusal, retry_after_s=_RETRY_S)
                await self._thread.run(self._engine.wake, waking)
                self._asleep -= waking
                self._tell()
                log.info("awake", extra={"still_asleep": sorted(self._asleep)})
        return self._asleep

    def _tell(self) -> None:
        if self._asleep:
            self._gate.pause(self, f"the server sleeps ({_names(self._asleep)} given back); wake it")
        else:
            self._gate.resume(self)


def _require(tags: Set[SleepTag]) -> None:
    if not tags:
        raise InvalidRequest(f"no tag; name at least one of {_names(EVERY_TAG)}")


def _names(tags: Set[SleepTag]) -> str:
    return ", ".join(tag for tag in SleepTag if tag in tags)
