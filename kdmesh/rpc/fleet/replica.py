"""One of several servers that do the same: connected again whenever it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Set
from typing import Generic, Protocol, TypeVar

from kdmesh.errors import (
    ConfigError,
    EngineFailure,
    InvalidRequest,
    KdmeshError,
    ModelMismatch,
    PermissionDenied,
    RpcError,
    Unauthenticated,
)
from kdmesh.rpc.fleet.routing import Router
from kdmesh.rpc.retry import RetryPolicy
from kdmesh.types import ServerLoad, SleepTag

log = logging.getLogger(__name__)

_FINAL = (InvalidRequest, ModelMismatch, PermissionDenied)  # asking the same again would be answered the same


class Client(Protocol):
    """A connection to one server, which is lost for good when it is lost."""

    @property
    def max_requests(self) -> int:
        """Most requests that may be under way at once."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether what it answers comes through this node's memory."""
        ...

    async def ask_load(self) -> ServerLoad | None:
        """What the server has to do now; None when such servers do not say. Raises Unavailable when it is not there."""
        ...

    async def sleep(self, tags: Set[SleepTag], *, drain_s: float) -> None:
        """Have the server give these back, after what it computes now. Raises RpcError when it does not."""
        ...

    async def wake(self, tags: Set[SleepTag]) -> None:
        """Have the server take these again. Raises RpcError when it does not."""
        ...

    async def wait_lost(self) -> RpcError:
        """Return when it cannot be used any more, with the reason."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


C = TypeVar("C", bound=Client)


class Replica(Generic[C]):
    """Belongs to one event loop.

    Args:
        kind: what such a server is called in logs.
        address: host:port.
        connect: one attempt at the address.
        router: told of what it does, while it is connected.
        on_change: called whenever it may have become usable, or has become useless.

    Attributes:
        client: the open connection; None while there is none.
        failure: why this replica is never used again; None as long as it may be.
        last_error: what the last attempt failed with, for messages.
        has_tried: whether the first attempt is over.
        is_leaving: it is sent nothing more.
    """

    def __init__(
        self,
        kind: str,
        address: str,
        connect: Callable[[str], Awaitable[C]],
        router: Router,
        on_change: Callable[[], None],
        *,
        is_near: Callable[[], bool],
    ) -> None:
        self.address = address
        self.client: C | None = None
        self.failure: KdmeshError | None = None
        self.last_error: KdmeshError | None = None
        self.has_tried = False
        self.is_leaving = False
        self._kind = kind
        self._connect = connect
        self._router = router
        self._on_change = on_change
        self._is_near = is_near
        self._outstanding_requests = 0
        self._slots_taken = 0
        self._rests_until_s = 0.0
        self._policy = RetryPolicy()

    @property
    def free_in_s(self) -> float:
        """How long until it takes a call; infinite when only an event can tell."""
        if self.client is None or self.is_leaving:
            return float("inf")
        now_s = time.monotonic()
        return max(0.0, self._rests_until_s - now_s, self._router.barred_s(self.address, now_s))

    @property
    def complaint(self) -> str:
        """What the last attempt failed with, after the address, which is named once; empty: nothing did."""
        said = "" if self.last_error is None else str(self.last_error).removeprefix(f"{self.address} ")
        return said and f"{self.address}: {said}"

    @property
    def has_slot(self) -> bool:
        """Whether it may be sent one more request that takes a slot."""
        return self.client is not None and self._slots_taken < self.client.max_requests

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return self._outstanding_requests == 0

    def rest(self, seconds: float) -> None:
        """Send it nothing for so long: it said that it is busy."""
        self._rests_until_s = max(self._rests_until_s, time.monotonic() + seconds)

    @contextlib.contextmanager
    def busy(self, num_tokens: int, *, takes_slot: bool) -> Iterator[None]:
        """Around a request; what ends it tells how the server does."""
        request = self._router.sent(self.address, num_tokens, time.monotonic())
        self._outstanding_requests += 1
        self._slots_taken += takes_slot
        is_answered = is_its_fault = False
        try:
            yield
            is_answered = True
        except EngineFailure:
            is_its_fault = True
            raise
        finally:
            self._outstanding_requests -= 1
            self._slots_taken -= takes_slot
            if is_answered:
                self._router.answered(request, time.monotonic())
            else:
                self._router.unanswered(request, time.monotonic(), is_its_fault=is_its_fault)
            self._on_change()

    async def run(self) -> None:
        """Stay connected until cancelled, or until the server turns out to be of no use."""
        attempt = 0
        try:
            while self.failure is None:
                wait_s = 0.0
                try:
                    self.client = await self._connect(self.address)
                    began_s = time.monotonic()
                    reason = await self._use(self.client)
                    if isinstance(reason, _FINAL):
                        raise reason
                    if time.monotonic() - began_s > self._policy.longest_s:
                        attempt = 0
                    else:
                        wait_s, attempt = self._policy.wait_s(attempt), attempt + 1
                except (*_FINAL, ConfigError, Unauthenticated) as error:
                    log.error(
                        "server refused", extra={"kind": self._kind, "address": self.address, "reason": str(error)}
                    )
                    self.failure = self.last_error = error
                except RpcError as error:
                    self.last_error = error
                    wait_s = self._policy.wait_s(attempt)
                    attempt += 1
                self.has_tried = True
                self._on_change()
                await asyncio.sleep(wait_s)
        finally:
            await self._drop()

    async def _use(self, client: C) -> RpcError:
        """Return when the connection is lost, with the reason."""
        self.has_tried = True
        self._rests_until_s = 0.0
        self._router.join(self.address, time.monotonic(), is_local=client.is_local or self._is_near())
        self._on_change()
        # Its frames hold the calls of the client, and those its connection, until the garbage collector comes.
        self.last_error = (await client.wait_lost()).with_traceback(None)
        self.last_error.__context__ = None
        log.warning("server lost", extra={"kind": self._kind, "address": self.address, "reason": str(self.last_error)})
        await self._drop()
        return self.last_error

    async def _drop(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            self._router.leave(self.address)
            await client.close()
