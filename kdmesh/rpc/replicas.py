"""Servers that do the same: finds the one with the least to do, and another when that one fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from kdmesh.errors import (
    DeadlineExpired,
    HandleGone,
    KdmeshError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from kdmesh.rpc.background_tasks import BackgroundTasks
from kdmesh.rpc.replica import Client, Replica
from kdmesh.rpc.retry import Deadline, RetryPolicy
from kdmesh.types import EVERY_TAG, SleepTag

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Client)
T = TypeVar("T")

_SETTLE_S = 60.0


class Replicas(Generic[C]):
    """Belongs to one event loop.

    Args:
        kind: what they are called in messages.
        addresses: host:port of each.
        connect: one attempt at an address.
        hopeless: why nobody need wait for one to become usable; None as long as that may be.

    Attributes:
        retries: requests that were sent once more.
    """

    def __init__(
        self,
        kind: str,
        addresses: Sequence[str],
        connect: Callable[[str], Awaitable[C]],
        *,
        hopeless: Callable[[], KdmeshError | None] = lambda: None,
    ) -> None:
        self.retries = 0
        self._hopeless = hopeless
        self._kind = kind
        self._changed = asyncio.Event()
        self._tasks = BackgroundTasks()
        self._policy = RetryPolicy()
        self._connect = connect
        self._asleep: frozenset[SleepTag] | None = None  # None: nobody has said, so they are left as they are
        self._replicas = [Replica(kind, address, self._connected, self._changed.set) for address in addresses]

    @property
    def clients(self) -> list[C]:
        """Those that are connected now."""
        return [replica.client for replica in self._replicas if replica.client is not None]

    async def start(self, deadline: Deadline) -> None:
        """Connect. Returns when every replica has been tried and one answers.

        Raises:
            ConfigError, ModelMismatch, Unauthenticated, PermissionDenied: a replica that answers is of no use.
            DeadlineExpired: none answers.
        """
        for replica in self._replicas:
            self._tasks.start(replica.run())
        await self._until(deadline, self._is_started)

    async def close(self) -> None:
        """Close every connection."""
        await self._tasks.close()

    def notify(self) -> None:
        """Have everybody who waits look at the replicas again."""
        self._changed.set()

    async def somewhere(
        self,
        call: Callable[[C], Awaitable[T]],
        num_tokens: int,
        deadline: Deadline,
        *,
        may: Callable[[C], bool] = lambda client: True,
    ) -> T:
        """What `call` returns for one replica, or the next when that one fails, until the deadline.

        Only those are asked that `may` be; `notify` says that it has changed its mind.

        Raises:
            DeadlineExpired: no replica answered in time.
            RpcError: whatever else `call` raises but Unavailable, HandleGone and Unauthenticated: a token may be
                exchanged at any time.
        """
        for attempt in itertools.count():
            replica = await self._choose(deadline, may)
            assert replica.client is not None
            try:
                with replica.busy(num_tokens):
                    async with asyncio.timeout(deadline.left_s):
                        return await call(replica.client)
            except TimeoutError:
                raise self._late(deadline, f"{replica.address} has not answered") from None
            except (Unavailable, HandleGone, Unauthenticated) as error:
                replica.last_error = error
                asked_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
                replica.rest(self._policy.wait_s(attempt, at_least_s=asked_s))
                self.retries += 1
        raise AssertionError("unreachable")

    async def set_asleep(self, tags: frozenset[SleepTag], deadline: Deadline) -> None:
        """Have every server give exactly these back, and those that connect later too.

        A server that is not there now is not waited for.

        Raises:
            DeadlineExpired: what a server computes did not finish in time, or it has not enough memory to wake.
            RpcError: whatever else sleep and wake of a client raise.
        """
        self._asleep = tags
        try:
            async with asyncio.TaskGroup() as telling:
                for replica in self._replicas:
                    telling.create_task(self._tell(replica, tags, deadline))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _tell(self, replica: Replica[C], tags: frozenset[SleepTag], deadline: Deadline) -> None:
        client = replica.client
        for attempt in itertools.count():
            if client is None or replica.client is not client:
                log.warning(
                    "a server is not there to be told", extra={"address": replica.address, "asleep": sorted(tags)}
                )
                return
            try:
                return await _settle(client, tags, drain_s=deadline.left_s)
            except Unavailable as error:
                replica.last_error = error
                wait_s = self._policy.wait_s(attempt, at_least_s=error.retry_after_s)
                if wait_s > deadline.left_s:
                    raise self._late(deadline, f"{replica.address} does neither sleep nor wake as it should") from None
                await asyncio.sleep(wait_s)

    async def _connected(self, address: str) -> C:
        """A new connection to a server that is as awake as all should be."""
        client = await self._connect(address)
        try:
            settled = None
            while settled != self._asleep:
                settled = self._asleep
                if settled is not None:
                    await _settle(client, settled, drain_s=_SETTLE_S)
        except BaseException:
            await client.close()
            raise
        return client

    def _is_started(self) -> bool:
        failures = [r.failure for r in self._replicas if r.failure is not None]
        if failures:
            raise failures[0]
        return all(r.has_tried for r in self._replicas) and any(r.client is not None for r in self._replicas)

    async def _choose(self, deadline: Deadline, may: Callable[[C], bool]) -> Replica[C]:
        """The free replica with the fewest outstanding tokens; waits for one."""
        chosen: list[Replica[C]] = []

        def is_chosen() -> bool:
            if all(r.failure is not None for r in self._replicas):
                raise next(r.failure for r in self._replicas if r.failure is not None)
            if (reason := self._hopeless()) is not None:
                raise reason
            free = [r for r in self._replicas if r.client is not None and r.free_in_s == 0 and may(r.client)]
            chosen[:] = sorted(free, key=lambda r: r.outstanding_tokens)[:1]
            return bool(chosen)

        await self._until(deadline, is_chosen)
        return chosen[0]

    async def _until(self, deadline: Deadline, is_so: Callable[[], bool]) -> None:
        """Return when `is_so`, which is asked again after every change of a replica.

        Raises:
            DeadlineExpired: it was not so in time.
        """
        while not is_so():
            if not deadline.left_s:
                raise self._late(deadline, f"no {self._kind} is ready")
            rest_s = min(r.free_in_s for r in self._replicas)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(deadline.left_s, rest_s)):
                    await self._changed.wait()

    def _late(self, deadline: Deadline, what: str) -> DeadlineExpired:
        reasons = "; ".join(f"{r.address}: {r.last_error}" for r in self._replicas if r.last_error is not None)
        return DeadlineExpired(f"{what} within {deadline.total_s:g} s{f' ({reasons})' if reasons else ''}")


async def _settle(client: Client, tags: frozenset[SleepTag], *, drain_s: float) -> None:
    """Have one server give back exactly these."""
    if tags != EVERY_TAG:
        # Who may not wake a server has not put it to sleep either; if it sleeps, it says so to every request.
        with contextlib.suppress(PermissionDenied):
            await client.wake(EVERY_TAG - tags)
    if tags:
        await client.sleep(tags, drain_s=drain_s)
