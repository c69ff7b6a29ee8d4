"""Tensors whose bytes this process reads by RDMA, out of the memory of a server on any node."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self, TypeVar

from torch import Tensor

from kdmesh.errors import EngineFailure, RpcError, Unavailable
from kdmesh.handles.doors.door import matrix_over
from kdmesh.handles.rdma.agent import Agent, RemoteMemory, check_transports
from kdmesh.handles.rdma.buffers import Buffer, Buffers, Graveyard, graveyard
from kdmesh.handles.rdma.thread import AgentThread
from kdmesh.types import Handle

P = TypeVar("P")
T = TypeVar("T")

# NIXL tells of no event. Between two looks a fast network carries a few MiB.
_LOOK_AGAIN_S = 0.0005
_READ_S = 10.0
_SLOWEST_BYTES_PER_S = 100e6
_CONNECT_S = 10.0
_FAREWELL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCalls:
    """What the door asks the server."""

    locate: Callable[[Handle | None], Awaitable[RemoteMemory]]
    """Where a handle's segment lies; without a handle, memory that begins with the nonce."""

    end: Callable[[Handle], Awaitable[None]]
    """End a handle. Raises HandleGone when it had ended before, so that its memory may have been written again."""

    abandon: Callable[[Handle], None]
    """End a handle that nobody wants any more; must not block."""


class RdmaDoor:
    """Reads each matrix to a registered buffer, then ends its handle, which proves that it was good until then.

    A read has a deadline of its own, because a peer that hangs never answers. After one that failed or is late the door
    is lost for good, with the buffers of all reads under way: what they still bring must hit nothing.
    """

    name = "rdma"

    def __init__(self, agent: Agent, server: ServerCalls, *, read_s: float, buried: Graveyard) -> None:
        """Use `connect`."""
        self._agent = agent
        self._server = server
        self._read_s = read_s
        self._graveyard = buried
        self._buffers = Buffers(agent)
        self._thread = AgentThread()
        self._peer = ""  # name of the server's agent
        self._known: dict[int, tuple[int, RemoteMemory]] = {}  # by segment, with its epoch
        self._loaded: list[RemoteMemory] = []  # all that the agent knows
        self._learning = asyncio.Lock()
        self._num_reading = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._fetching: set[asyncio.Task[Tensor]] = set()
        self._failure: Unavailable | None = None
        self._on_lost: Callable[[Unavailable], None] = lambda reason: None
        _doors.add(self)

    @classmethod
    async def connect(
        cls,
        server: ServerCalls,
        nonce: bytes,
        *,
        on_lost: Callable[[Unavailable], None] = lambda reason: None,
        read_s: float = _READ_S,
        buried: Graveyard = graveyard,
    ) -> Self:
        """The door to the server that told `nonce`, which was read through it.

        Args:
            server: how to ask it.
            nonce: what lies in its memory.
            on_lost: called once, when a read fails and the door is lost.
            read_s: longest time for a read, beside a second for every 100 MB.
            buried: where buffers go that cannot be used again.

        Raises:
            ConfigError: this process has no NIXL, or could use transports that are not safe.
            Unavailable: RDMA does not lead to that server, or this process had too many reads that did not end.
            HandleGone: the session has ended.
        """
        if buried.is_full:
            raise Unavailable(
                f"{buried.size_bytes} bytes and {buried.num_agents} agents of reads that did not end are kept; "
                "for RDMA, restart this process"
            )
        check_transports(os.environ)
        agent = await asyncio.to_thread(Agent, is_read=False)
        door = cls(agent, server, read_s=read_s, buried=buried)
        try:
            await door._prove(nonce)
        except BaseException:
            door.close()
            raise
        door._on_lost = on_lost
        return door

    async def fetch(self, handle: Handle) -> Tensor:
        """See Door. When cancelled, the read goes on to its end, for nobody."""
        if self._failure is not None:
            self._server.abandon(handle)
            raise Unavailable(str(self._failure))
        fetching = asyncio.get_running_loop().create_task(self._fetch(handle), name="rdma read")
        self._fetching.add(fetching)
        fetching.add_done_callback(self._fetched)
        return await asyncio.shield(fetching)

    def forget(self, handle: Handle) -> None:
        """See Door."""
        self._known.pop(handle.segment, None)

    def close(self) -> None:
        """See Door. The server's agent is told."""
        self._on_lost = lambda reason: None
        self._fail(Unavailable("the RDMA door was closed"))
        _doors.discard(self)
        self.say_farewell()
        self._thread.stop()

    def say_farewell(self) -> concurrent.futures.Future[None]:
        """Disconnect soon: a reader that leaves without may keep the server from serving others."""
        return self._thread.submit(_remove_peer, self._agent, self._peer)

    # Inside

    async def _prove(self, nonce: bytes) -> None:
        """Read the nonce."""
        probe = await self._server.locate(None)
        self._peer = probe.agent
        await self._learn(probe)
        buffer = await self._read(probe, offset_bytes=0, size_bytes=len(nonce))
        told = bytes(buffer.memory[: len(nonce)])
        self._buffers.give_back(buffer)
        if told != nonce:
            raise Unavailable("RDMA leads to another server")

    async def _fetch(self, handle: Handle) -> Tensor:
        try:
            source = await self._locate(handle)
            try:
                if handle.offset_bytes + handle.size_bytes > source.size_bytes:
                    raise EngineFailure(
                        f"a handle to {handle.size_bytes} bytes at {handle.offset_bytes} does not fit in its "
                        f"segment {handle.segment} of {source.size_bytes} bytes"
                    )
                buffer = await self._read(source, offset_bytes=handle.offset_bytes, size_bytes=handle.size_bytes)
            finally:
                self._end_reading()
        except BaseException:
            self._server.abandon(handle)
            raise
        exporter = self._buffers.lend(buffer)
        await self._server.end(handle)
        return matrix_over(exporter, handle, offset_bytes=0)

    def _fetched(self, fetching: asyncio.Task[Tensor]) -> None:
        self._fetching.discard(fetching)
        if not fetching.cancelled():
            fetching.exception()  # nobody else may look

    async def _locate(self, handle: Handle) -> RemoteMemory:
        """Where to read; whoever gets it must call _end_reading."""
        known = self._known.get(handle.segment)
        if known is None or known[0] != handle.epoch or self._learning.locked():
            async with self._learning:
                known = self._known.get(handle.segment)
                if known is None or known[0] != handle.epoch:
                    known = (handle.epoch, await self._server.locate(handle))
                    await self._learn(known[1])
                    self._known[handle.segment] = known
        self._num_reading += 1
        self._is_idle.clear()
        return known[1]

    def _end_reading(self) -> None:
        self._num_reading -= 1
        if self._num_reading == 0:
            self._is_idle.set()

    async def _learn(self, memory: RemoteMemory) -> None:
        """Let the agent know of memory of the server."""
        try:
            if memory.agent != self._peer:
                raise Unavailable(f"RDMA: the server is agent {memory.agent} now; it was {self._peer}")
            if any(memory.overlaps(loaded) and memory != loaded for loaded in self._loaded):
                # Memory that was there before is gone. NIXL would go on to use its keys.
                await self._is_idle.wait()
                await self._call(self._agent.remove_peer, self._peer)
                self._known.clear()
                self._loaded.clear()
            await self._call(self._agent.add_peer, memory)
        except Unavailable as error:
            self._fail(error)
            raise
        self._loaded.append(memory)

    async def _read(self, source: RemoteMemory, *, offset_bytes: int, size_bytes: int) -> Buffer:
        """A buffer that begins with those bytes of the server."""
        buffer = await self._call(self._buffers.take, size_bytes)
        within_s = self._read_s + size_bytes / _SLOWEST_BYTES_PER_S
        try:
            async with asyncio.timeout(within_s):
                await self._fill(buffer, source, offset_bytes=offset_bytes, size_bytes=size_bytes)
        except BaseException as error:
            self._graveyard.bury(self._agent, buffer)
            if isinstance(error, TimeoutError):
                error = Unavailable(f"RDMA: a read did not end within {within_s:.1f} s")
            self._fail(error if isinstance(error, Unavailable) else Unavailable("an RDMA read was broken off"))
            raise error from None
        return buffer

    async def _fill(self, buffer: Buffer, source: RemoteMemory, *, offset_bytes: int, size_bytes: int) -> None:
        run = self._thread.submit
        begin = self._agent.begin_read
        # In the thread: over some transports the first call copies all the bytes.
        transfer = await asyncio.wrap_future(
            run(begin, source, buffer.own, offset_bytes=offset_bytes, size_bytes=size_bytes)
        )
        while not transfer.is_done:
            if self._failure is not None:
                raise Unavailable(str(self._failure))
            await asyncio.sleep(_LOOK_AGAIN_S)
            transfer = await asyncio.wrap_future(run(self._agent.poll, transfer))
        await asyncio.wrap_future(run(self._agent.end, transfer))

    async def _call(self, call: Callable[[P], T], argument: P) -> T:
        """In the door's thread."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await asyncio.wrap_future(self._thread.submit(call, argument))
        except TimeoutError:
            raise Unavailable(f"RDMA: NIXL did not answer within {_CONNECT_S} s") from None

    def _fail(self, error: RpcError) -> None:
        if self._failure is None:
            self._failure = Unavailable(str(error))
            self._on_lost(self._failure)


_doors: weakref.WeakSet[RdmaDoor] = weakref.WeakSet()


@atexit.register
def _say_farewell() -> None:
    concurrent.futures.wait([door.say_farewell() for door in tuple(_doors)], timeout=_FAREWELL_S)


def _remove_peer(agent: Agent, name: str) -> None:
    with contextlib.suppress(Unavailable):
        agent.remove_peer(name)
