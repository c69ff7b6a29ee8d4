"""Servers that do the same: finds the one that answers first, and another when that one fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from kdmesh.errors import (
    DeadlineExpired,
    EngineFailure,
    HandleGone,
    KdmeshError,
    PermissionDenied,
    RpcError,
    Unauthenticated,
    Unavailable,
)
from kdmesh.rpc.background_tasks import BackgroundTasks
from kdmesh.rpc.channel import UnusableAccess
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.hedging import hedged
from kdmesh.rpc.fleet.replica import Client, Replica
from kdmesh.rpc.fleet.routing import Router, RoutingPolicy
from kdmesh.rpc.fleet.sent_tokens import SentTokens
from kdmesh.rpc.fleet.told_waiting import told_waiting
from kdmesh.rpc.retry import Deadline, RetryPolicy
from kdmesh.types import EVERY_TAG, ServerLoad, SleepTag

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Client)
T = TypeVar("T")

_SETTLE_S = 60.0
_ASK_S = 0.25  # longest wait for a load; a server that takes longer is left aside for now
_IMBALANCE_WINDOW_S = 60


class Replicas(Generic[C]):
    """Belongs to one event loop.

    Args:
        kind: what they are called in messages.
        discovery: where they are; one that comes later joins, one that is not named any more leaves after its requests.
        connect: one attempt at an address.
        routing: which of them gets a request.
        hopeless: why nobody need wait for one to become usable; None as long as that may be.
        joined: called with each new connection, which is one of `clients` as soon as this has returned.

    Attributes:
        retries: requests that were sent once more.
    """

    def __init__(
        self,
        kind: str,
        discovery: Discovery,
        connect: Callable[[str], Awaitable[C]],
        *,
        routing: RoutingPolicy,
        hopeless: Callable[[], KdmeshError | None] = lambda: None,
        joined: Callable[[C], None] = lambda client: None,
    ) -> None:
        self.retries = 0
        self._hopeless = hopeless
        self._joined = joined
        self._kind = kind
        self._changed = asyncio.Event()
        self._tasks = BackgroundTasks()
        self._policy = RetryPolicy()
        self._connect = connect
        self._was_let_in = False  # by any of them
        self._asleep: frozenset[SleepTag] | None = None  # None: nobody has said, so they are left as they are
        self._discovery = discovery
        self._routing = routing
        self._router = Router(routing, random.Random())
        self._sent = SentTokens(_IMBALANCE_WINDOW_S)
        self._replicas: list[Replica[C]] = []

    @property
    def clients(self) -> list[C]:
        """Those that are connected now."""
        return [replica.client for replica in self._replicas if replica.client is not None]

    @property
    def addresses(self) -> frozenset[str]:
        """Of those that are wanted now, connected or not."""
        return frozenset(replica.address for replica in self._replicas if not replica.is_leaving)

    @property
    def usable(self) -> tuple[str, ...]:
        """Addresses of those that are wanted now, were tried, and turned out to be what they should."""
        return tuple(
            replica.address
            for replica in self._replicas
            if not replica.is_leaving and replica.has_tried and replica.failure is None
        )

    @property
    def imbalance(self) -> float | None:
        """Most over mean tokens that were sent to a connected one in the last minute; None for fewer than two."""
        names = [replica.address for replica in self._replicas if replica.client is not None]
        return self._sent.imbalance(names, time.monotonic())

    def note_load(self, address: str, load: ServerLoad) -> None:
        """A server has said what it has to do."""
        self._router.reported(address, load, time.monotonic())

    async def start(self, deadline: Deadline) -> None:
        """Connect. Returns when every replica has been tried and one answers; the log says who is waited for.

        Raises:
            ConfigError, ModelMismatch, Unauthenticated, PermissionDenied: a replica that answers is of no use.
            DeadlineExpired: none answers.
        """
        self._tasks.start(self._discover())
        async with told_waiting(
            self._kind, lambda: {r.address: r.last_error for r in self._replicas if r.client is None}
        ):
            await self._until(deadline, self._is_started)

    async def close(self) -> None:
        """Close every connection."""
        await self._tasks.close()
        await self._discovery.close()

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
        may_hedge: bool = False,
        takes_slot: bool = True,
    ) -> T:
        """What `call` returns for one replica, or the next when that one fails, until the deadline.

        Only those are asked that `may` be; `notify` says that it has changed its mind.

        Args:
            may_hedge: whether two replicas may be asked at once, if the routing says so; what comes first is returned,
                and the other call is cancelled.
            takes_slot: whether the call is one of those of which a client has `max_requests` at most under way.

        Raises:
            DeadlineExpired: no replica answered in time.
            EngineFailure: every replica that is there has failed on it.
            RpcError: whatever else `call` raises but Unavailable, HandleGone and Unauthenticated: a token may be
                exchanged at any time.
        """
        asked: set[Replica[C]] = set()

        def ask() -> Coroutine[Any, Any, T]:
            return self._one_after_another(call, num_tokens, deadline, may, asked, takes_slot)

        after_s = self._routing.hedge_after_s
        return await (hedged(ask, after_s=after_s) if may_hedge and after_s is not None else ask())

    async def _one_after_another(
        self,
        call: Callable[[C], Awaitable[T]],
        num_tokens: int,
        deadline: Deadline,
        may: Callable[[C], bool],
        asked: set[Replica[C]],  # by this and others like it, at the moment; none of them is asked twice at once
        takes_slot: bool,
    ) -> T:
        failed: set[Replica[C]] = set()  # by the server's fault

        def is_one(replica: Replica[C]) -> bool:
            return replica not in failed | asked and replica.client is not None and may(replica.client)

        for attempt in itertools.count():
            replica = await self._choose(num_tokens, deadline, lambda r: is_one(r) and (r.has_slot or not takes_slot))
            assert replica.client is not None
            asked.add(replica)
            try:
                with replica.busy(num_tokens, takes_slot=takes_slot):
                    self._sent.add(replica.address, num_tokens, time.monotonic())
                    async with asyncio.timeout(deadline.left_s):
                        return await call(replica.client)
            except TimeoutError:
                raise self._late(deadline, f"{replica.address} has not answered") from None
            except (Unavailable, HandleGone, Unauthenticated) as error:
                replica.last_error = error
                asked_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
                replica.rest(self._policy.wait_s(attempt, at_least_s=asked_s))
            except EngineFailure as error:
                replica.last_error = error
                failed.add(replica)
                if not any(is_one(other) for other in self._replicas):
                    raise
            finally:
                asked.discard(replica)
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
        try:
            client = await self._connect(address)
        except (Unauthenticated, UnusableAccess) as error:
            if not self._was_let_in:
                raise
            # Secrets are being exchanged, on both sides, and ours are read again.
            raise Unavailable(str(error), retry_after_s=0.0) from None
        self._was_let_in = True
        try:
            settled = None
            while settled != self._asleep:
                settled = self._asleep
                if settled is not None:
                    await _settle(client, settled, drain_s=_SETTLE_S)
        except BaseException:
            await client.close()
            raise
        self._joined(client)  # nothing is awaited from here until the replica has it
        return client

    def _is_started(self) -> bool:
        failures = [r.failure for r in self._replicas if r.failure is not None]
        if failures:
            raise failures[0]
        return all(r.has_tried for r in self._replicas) and any(r.client is not None for r in self._replicas)

    # Who is there

    async def _discover(self) -> None:
        """Keep to the addresses that are wanted, until cancelled."""
        while True:
            wanted = await self._discovery.look()
            for replica in self._replicas:
                if replica.address not in wanted and not replica.is_leaving:
                    replica.is_leaving = True
                    log.info("server leaves", extra={"kind": self._kind, "address": replica.address})
            for address in wanted:
                if address not in self.addresses:
                    self._add(address)
            self._changed.set()
            if not self._discovery.changes:
                return
            await self._discovery.wait(self._routing.look_every_s)

    def _add(self, address: str) -> None:
        for replica in self._replicas:
            if replica.address == address:  # it was about to leave
                replica.is_leaving = False
                return
        replica = Replica(
            self._kind,
            address,
            self._connected,
            self._router,
            self._changed.set,
            is_near=lambda: self._discovery.is_near(address),
        )
        self._replicas.append(replica)
        self._tasks.start(self._keep(replica))

    async def _keep(self, replica: Replica[C]) -> None:
        """Stay connected to one until it has left, its last requests answered."""
        running = self._tasks.start(replica.run())
        while not (replica.is_leaving and replica.is_idle):
            await self._change()
        self._replicas.remove(replica)
        running.cancel()
        await asyncio.wait((running,))

    # Waiting

    async def _choose(self, num_tokens: int, deadline: Deadline, may: Callable[[Replica[C]], bool]) -> Replica[C]:
        """The one that answers first, of those that take a request now; waits for one."""
        while True:
            free = await self._free(deadline, may)
            drawn = self._router.draw(tuple(free), time.monotonic())
            there = await self._look_at([free[address] for address in drawn], deadline)
            still = [r.address for r in there if r in self._replicas and r.free_in_s == 0 and may(r)]
            if still:
                return free[self._router.best(still, num_tokens, time.monotonic())]

    async def _free(self, deadline: Deadline, may: Callable[[Replica[C]], bool]) -> dict[str, Replica[C]]:
        """Those that take a request now, by address; waits for one."""
        free: dict[str, Replica[C]] = {}

        def is_some() -> bool:
            if self._replicas and all(r.failure is not None for r in self._replicas):
                raise next(r.failure for r in self._replicas if r.failure is not None)
            if (reason := self._hopeless()) is not None:
                raise reason
            free.update((r.address, r) for r in self._replicas if r.free_in_s == 0 and may(r))
            return bool(free)

        await self._until(deadline, is_some)
        return free

    async def _look_at(self, drawn: Sequence[Replica[C]], deadline: Deadline) -> list[Replica[C]]:
        """Those that say what they have to do, where there is a choice or a doubt."""
        if len(drawn) == 1 and not self._router.is_on_trial(drawn[0].address):
            return list(drawn)
        answers = await asyncio.gather(*(self._ask_load(r, min(_ASK_S, deadline.left_s)) for r in drawn))
        return [replica for replica, is_there in zip(drawn, answers, strict=True) if is_there]

    async def _ask_load(self, replica: Replica[C], timeout_s: float) -> bool:
        """Whether it is there; its load is noted."""
        client = replica.client
        if client is None or self._router.is_known(replica.address, time.monotonic()):
            return client is not None
        try:
            async with asyncio.timeout(timeout_s):
                load = await client.ask_load()
        except (RpcError, TimeoutError):
            if replica.client is client:
                self._router.failed(replica.address, time.monotonic())
            return False
        if load is not None and replica.client is client:
            self.note_load(replica.address, load)
        return True

    async def _until(self, deadline: Deadline, is_so: Callable[[], bool]) -> None:
        """Return when `is_so`, which is asked again after every change of a replica.

        Raises:
            DeadlineExpired: it was not so in time.
        """
        while True:
            # Before the look, which judges those that are free by now: only a change makes it judge them otherwise.
            rests_s = [rest_s for r in self._replicas if (rest_s := r.free_in_s) > 0]
            if is_so():
                return
            if not deadline.left_s:
                raise self._late(deadline, f"no {self._kind} is ready")
            rest_s = min(rests_s, default=float("inf"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(deadline.left_s, rest_s)):
                    await self._change()

    async def _change(self) -> None:
        """Return when anything of a replica is different; called at once after a look at them."""
        self._changed.clear()
        await self._changed.wait()

    def _late(self, deadline: Deadline, what: str) -> DeadlineExpired:
        reasons = "; ".join(filter(None, (self._discovery.last_error, *(r.complaint for r in self._replicas))))
        return DeadlineExpired(f"{what} within {deadline.total_s:g} s{f' ({reasons})' if reasons else ''}")


async def _settle(client: Client, tags: frozenset[SleepTag], *, drain_s: float) -> None:
    """Have one server give back exactly these."""
    if tags != EVERY_TAG:
        # Who may not wake a server has not put it to sleep either; if it sleeps, it says so to every request.
        with contextlib.suppress(PermissionDenied):
            await client.wake(EVERY_TAG - tags)
    if tags:
        await client.sleep(tags, drain_s=drain_s)
