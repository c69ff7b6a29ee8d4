"""Tensors over a server's shared memory, on the server's node."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from kdmesh.errors import EngineFailure, HandleGone, RpcError, Unavailable
from kdmesh.handles.doors.door import matrix_over
from kdmesh.handles.slab import messages
from kdmesh.handles.slab.memory import map_readonly
from kdmesh.handles.slab.messages import Op, Reply, Request, Status
from kdmesh.types import Handle
from kdmesh.unix_path import unix_address


class ShmDoor:
    """Maps each segment once; after that, an answer comes with its claim, and a fetch asks nobody.

    When the last view of a fetched tensor dies, in whatever thread, its handle is released.
    """

    name = "shm"

    def __init__(self, wire: _Wire, on_lost: Callable[[Unavailable], None]) -> None:
        """Use `connect`."""
        self._wire: _Wire | None = wire
        self._on_lost = on_lost
        self._mappings: dict[int, _Mapping] = {}  # by segment, each in its newest epoch
        self._claims: deque[_Claim] = deque()  # sent and unanswered, oldest first
        self._turns = asyncio.Semaphore(messages.MAX_UNANSWERED)
        wire.loop.add_reader(wire.sock, self._readable)

    @classmethod
    async def connect(
        cls,
        socket_path: Path,
        session: bytes,
        nonce: bytes,
        *,
        on_lost: Callable[[Unavailable], None] = lambda reason: None,
        timeout_s: float = 5.0,
    ) -> Self:
        """The door to the server that told `nonce` and opened `session`.

        Args:
            on_lost: called when a segment's memory did not come, and never will in this session.

        Raises:
            Unavailable: that server cannot be reached through this socket; use another door.
            HandleGone: the session has ended.
        """
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise Unavailable(f"no shared memory through {socket_path}: {error}") from None
        sock.setblocking(False)
        try:
            with unix_address(socket_path) as address:
                sock.connect(address)
            sock.send(Request(Op.HELLO, messages.VERSION, 0, session).pack())
            async with asyncio.timeout(timeout_s):
                reply = Reply.unpack(await asyncio.get_running_loop().sock_recv(sock, messages.RECEIVE_BYTES))
            if reply is None or (reply.status is Status.OK and reply.nonce != nonce):
                raise ConnectionError("another server answers there")
            if reply.status is Status.GONE:
                raise HandleGone("the session is unknown or its lease has ended; open a new one")
        except OSError as error:  # TimeoutError is one
            sock.close()
            reason = str(error) or f"no answer in {timeout_s} s"
            raise Unavailable(f"no shared memory through {socket_path}: {reason}") from None
        except BaseException:
            sock.close()
            raise
        return cls(_Wire(sock), on_lost)

    async def fetch(self, handle: Handle) -> Tensor:
        """See Door. A write to the tensor kills the process: the memory is mapped read-only."""
        if handle.is_claimed:
            return self._tensor(self._open_wire(), handle)
        try:
            await self._turns.acquire()
        except asyncio.CancelledError:
            if self._wire is not None:
                self._wire.send(_release_of(handle))  # nobody will claim it
            raise
        try:
            wire = self._open_wire()
            answer: asyncio.Future[Tensor] = wire.loop.create_future()
            self._claims.append(_Claim(handle=handle, answer=answer))
            wire.send(Request(Op.CLAIM, handle.segment, handle.epoch, handle.token).pack())
            try:
                return await answer
            finally:
                del wire, answer  # an error refers to this frame, and would keep the socket open until it is collected
        finally:
            self._turns.release()

    def forget(self, handle: Handle) -> None:
        """See Door. Its memory goes with the last tensor over it."""
        self._mappings.pop(handle.segment, None)

    def close(self) -> None:
        """See Door. The socket, the broker's sign that somebody reads, stays open until the last tensor is gone."""
        self._end(Unavailable("the shared-memory door was closed"))

    def _end(self, error: RpcError) -> None:
        if self._wire is None:
            return
        self._wire.loop.remove_reader(self._wire.sock)
        self._wire = None
        self._mappings.clear()
        while self._claims:
            _settle(self._claims.popleft().answer, error)

    def _readable(self) -> None:
        assert self._wire is not None
        try:
            message, fds, _, _ = socket.recv_fds(self._wire.sock, messages.RECEIVE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            message, fds = b"", []
        try:
            self._answered(message, fds)
        finally:
            for fd in fds:  # a mapping does not need it
                os.close(fd)

    def _answered(self, message: bytes, fds: list[int]) -> None:
        if not message:
            self._end(Unavailable("the server closed its shared memory"))
            return
        reply = Reply.unpack(message)
        if reply is None or not self._claims:
            self._end(EngineFailure("the broker said something that is not part of the protocol"))
            return
        claim = self._claims.popleft()
        if reply.status is Status.GONE:
            gone = HandleGone(f"the handle to segment {claim.handle.segment} has ended, or its session")
            _settle(claim.answer, gone)
            return
        if not fds and not self._has_mapped(claim.handle):
            # The broker sends it once. Where this process may open no more files, the system has dropped it.
            lost = Unavailable(
                f"segment {claim.handle.segment} cannot be mapped: no descriptor came; has this process as many open "
                "files as it may have (`ulimit -n`)?"
            )
            _settle(claim.answer, lost)
            self._end(lost)
            self._on_lost(lost)
            return
        try:
            if fds:
                self._map(claim.handle, fds[0], reply.size_bytes)
            result: Tensor | RpcError = self._tensor(self._open_wire(), claim.handle)
        except RpcError as error:
            result = error
        # When nobody waits any more, the tensor dies here, and the slot is released.
        _settle(claim.answer, result)

    def _open_wire(self) -> _Wire:
        if self._wire is None:
            raise Unavailable("the shared-memory door is closed")
        return self._wire

    def _map(self, handle: Handle, fd: int, size_bytes: int) -> None:
        try:
            self._mappings[handle.segment] = _Mapping(handle.epoch, map_readonly(fd, size_bytes))
        except (OSError, ValueError, EngineFailure) as error:
            raise EngineFailure(f"segment {handle.segment} cannot be mapped: {error}") from None

    def _has_mapped(self, handle: Handle) -> bool:
        mapping = self._mappings.get(handle.segment)
        return mapping is not None and mapping.epoch == handle.epoch

    def _tensor(self, wire: _Wire, handle: Handle) -> Tensor:
        """Over a segment that was mapped; the broker counts this process as its reader."""
        if not self._has_mapped(handle):
            raise EngineFailure(f"segment {handle.segment} cannot be mapped: no descriptor came, and none is known")
        mapping = self._mappings[handle.segment]
        size_bytes = len(mapping.memory)
        if handle.offset_bytes + handle.size_bytes > size_bytes:
            raise EngineFailure(
                f"segment {handle.segment} cannot be mapped: {handle.size_bytes} bytes at {handle.offset_bytes} "
                f"do not fit in its {size_bytes} bytes"
            )
        exporter = mapping.exporter()
        # Also keeps the memory mapped and the wire open. Not at exit: threads may still read then.
        weakref.finalize(exporter, _release, wire, _release_of(handle), mapping.memory).atexit = False
        return matrix_over(exporter, handle, offset_bytes=handle.offset_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    handle: Handle
    answer: asyncio.Future[Tensor]


class _Mapping:
    """One segment in one epoch."""

    def __init__(self, epoch: int, memory: mmap.mmap) -> None:
        self.epoch = epoch
        self.memory = memory
        self._address = np.frombuffer(memory, np.uint8).ctypes.data
        self._kind = ctypes.c_char * len(memory)

    def exporter(self) -> ctypes.Array[ctypes.c_char]:
        """A new buffer over the whole memory; its death says that one tensor and its views are gone.

        ctypes calls it writable, which it is not, and so torch does not warn of it.
        """
        return self._kind.from_address(self._address)


class _Wire:
    """A connection to the broker, open as long as anything refers to this."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self._unsent: deque[bytes] = deque()
        weakref.finalize(self, sock.close)
        _wires.add(self)

    def send(self, message: bytes) -> None:
        """Send now or soon, in order. For any thread and for finalizers: it takes no lock and never waits."""
        if self._unsent or not self._is_sent(message):
            self._unsent.append(message)
            with contextlib.suppress(RuntimeError):  # the loop is closed, so this process is done with the server
                self.loop.call_soon_threadsafe(self._flush)

    def _is_sent(self, message: bytes) -> bool:
        try:
            self.sock.send(message)
        except BlockingIOError:
            return False
        except OSError:  # nobody is there; whoever waits for a reply will read that
            pass
        return True

    def _flush(self) -> None:
        while self._unsent:
            if not self._is_sent(self._unsent[0]):
                self.loop.add_writer(self.sock, self._flush)
                return
            self._unsent.popleft()
        self.loop.remove_writer(self.sock)


def _release_of(handle: Handle) -> bytes:
    return Request(Op.RELEASE, handle.segment, handle.epoch, handle.token).pack()


def _release(wire: _Wire, message: bytes, memory: mmap.mmap) -> None:
    del memory
    wire.send(message)


def _settle(answer: asyncio.Future[Tensor], result: Tensor | RpcError) -> None:
    if answer.done():  # cancelled
        return
    if isinstance(result, RpcError):
        answer.set_exception(result)
    else:
        answer.set_result(result)


_wires: weakref.WeakSet[_Wire] = weakref.WeakSet()


def _close_in_child() -> None:
    for wire in tuple(_wires):
        wire.sock.close()


# A forked child that kept the socket open would hide its parent's death, and a finalizer in it would release what the
# parent still reads.
os.register_at_fork(after_in_child=_close_in_child)
