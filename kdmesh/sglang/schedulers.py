"""The scheduler processes of one SGLang engine, as they report to the server that started them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kdmesh.errors import EngineFailure
from kdmesh.handles.slab.memory import Segment, SegmentWriter
from kdmesh.handles.slab.peers import peer_pidfd
from kdmesh.sglang.messages import RECEIVE_BYTES, Adopt, Adopted, Drop, Hello, pack, unpack
from kdmesh.unix_path import unix_address

_BACKLOG = 128
# Mapping and touching 64 GiB takes one process a few seconds, and all of a server's do it at once.
_ADOPT_S = 60.0
_ADOPT_BYTES_PER_S = 2**30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scheduler:
    """One process."""

    sock: socket.socket
    pidfd: int | None
    pid: int
    hello: Hello


class Schedulers:
    """Lets those that write map the segments, and notices at once when one dies.

    A `SegmentWriter`: adopt and drop may be called from any thread.
    """

    def __init__(self, socket_path: Path) -> None:
        """Listen there; the socket is removed by `close`."""
        self.socket_path = socket_path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with unix_address(socket_path) as address:
            self._listener.bind(address)
        self._listener.listen(_BACKLOG)
        self._schedulers: list[_Scheduler] = []
        self._changed = threading.Condition()
        self._adopted: set[tuple[int, int]] = set()  # (pid, segment number)
        self._death: str | None = None
        self._others: dict[int, int] = {}  # process ids by the descriptors that tell of their deaths
        self._watcher: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()

    def wait_reports(self, count: int, timeout_s: float) -> None:
        """Return when that many schedulers have reported.

        Raises:
            EngineFailure: they have not, or one runs without our hooks.
        """
        deadline_s = time.monotonic() + timeout_s
        while len(self._schedulers) < count:
            try:
                self._listener.settimeout(_left_s(deadline_s))
                reporting = self._listener.accept()[0]
                reporting.settimeout(_left_s(deadline_s))
                if (scheduler := _received(reporting)) is not None:
                    self._schedulers.append(scheduler)
            except TimeoutError:
                raise EngineFailure(
                    f"{len(self._schedulers)} of {count} SGLang schedulers reported: the others run without kdmesh's "
                    "plugin; SGLang's log above says why it did not load"
                ) from None
        for scheduler in self._schedulers:
            if scheduler.hello.unhooked:
                raise EngineFailure(
                    f"the SGLang scheduler {scheduler.hello.rank} could not hook {', '.join(scheduler.hello.unhooked)}"
                )

    @property
    def pids(self) -> tuple[int, ...]:
        """Of those that have reported."""
        return tuple(scheduler.pid for scheduler in self._schedulers)

    def watch(self, on_death: Callable[[str], None], others: Iterable[int] = ()) -> None:
        """From now on call `on_death` with the reason, once and from a thread, when a scheduler dies.

        Args:
            others: ids of processes through which requests come to the schedulers; they are missed too.
        """
        watch: Callable[[Callable[[str], None]], None] = self._watch
        for pid in others:
            try:
                self._others[os.pidfd_open(pid)] = pid
            except ProcessLookupError:
                watch = partial(self._died, _other(pid))
            except OSError:  # a kernel without such descriptors
                continue
        self._watcher = threading.Thread(target=watch, args=(on_death,), name="sglang-schedulers", daemon=True)
        self._watcher.start()

    def adopt(self, segment: Segment) -> None:
        """Show a segment to all that write rows; `watch` must have begun."""
        self._show(segment, [scheduler for scheduler in self._schedulers if scheduler.hello.writes])

    def drop(self, segment: Segment) -> None:
        """Tell all that know it that it is over."""
        for scheduler in self._schedulers:
            with contextlib.suppress(OSError):  # a dead one uses it no more either
                scheduler.sock.send(pack(Drop(number=segment.number)))

    @property
    def readers_of_weights(self) -> SegmentWriter:
        """All of them, to be shown the segment that new weights lie in."""
        return _ReadersOfWeights(self)

    def show_weights(self, segment: Segment) -> None:
        """Show all of them the segment that new weights lie in."""
        self._show(segment, self._schedulers, holds_weights=True)

    def _show(self, segment: Segment, schedulers: Sequence[_Scheduler], *, holds_weights: bool = False) -> None:
        patience_s = _ADOPT_S + segment.size_bytes / _ADOPT_BYTES_PER_S
        message = pack(Adopt(number=segment.number, size_bytes=segment.size_bytes, holds_weights=holds_weights))
        for scheduler in schedulers:
            socket.send_fds(scheduler.sock, [message], [segment.fd])
        wanted = {(scheduler.pid, segment.number) for scheduler in schedulers}
        with self._changed:
            self._changed.wait_for(lambda: self._death is not None or wanted <= self._adopted, patience_s)
            is_adopted = wanted <= self._adopted
            self._adopted -= wanted
        if not is_adopted:
            did_not = f"SGLang did not map {segment.size_bytes} bytes in {patience_s:.0f} s"
            raise ConnectionResetError(self._death or did_not)

    def close(self) -> None:
        """Hang up; no death is told any more."""
        os.write(self._wake_write, b"x")
        if self._watcher is not None:
            self._watcher.join()
        for scheduler in self._schedulers:
            scheduler.sock.close()
            if scheduler.pidfd is not None:
                os.close(scheduler.pidfd)
        self._listener.close()
        self.socket_path.unlink(missing_ok=True)
        for descriptor in (self._wake_read, self._wake_write, *self._others):
            os.close(descriptor)

    def _watch(self, on_death: Callable[[str], None]) -> None:
        poll = select.poll()
        for descriptor in (self._wake_read, *self._others):
            poll.register(descriptor, select.POLLIN)
        by_descriptor: dict[int, _Scheduler] = {}
        for scheduler in self._schedulers:
            for known in (scheduler.sock.fileno(), scheduler.pidfd):
                if known is not None:
                    by_descriptor[known] = scheduler
                    poll.register(known, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._wake_read:
                    return
                if descriptor in self._others:
                    self._died(_other(self._others[descriptor]), on_death)
                    return
                scheduler = by_descriptor[descriptor]
                if descriptor == scheduler.pidfd or not self._heard(scheduler):
                    self._died(f"the SGLang scheduler {scheduler.hello.rank} (process {scheduler.pid})", on_death)
                    return

    def _heard(self, scheduler: _Scheduler) -> bool:
        """Take one message; False when there will be none."""
        try:
            data = scheduler.sock.recv(RECEIVE_BYTES)
        except OSError:
            return False
        if data:
            message = unpack(data)
            assert isinstance(message, Adopted)
            with self._changed:
                self._adopted.add((scheduler.pid, message.number))
                self._changed.notify_all()
        return bool(data)

    def _died(self, who: str, on_death: Callable[[str], None]) -> None:
        reason = f"{who} died"
        with self._changed:
            self._death = reason
            self._changed.notify_all()
        on_death(reason)


@dataclass(frozen=True, slots=True)
class _ReadersOfWeights:
    """A `SegmentWriter`, though they only read."""

    schedulers: Schedulers

    def adopt(self, segment: Segment) -> None:
        self.schedulers.show_weights(segment)

    def drop(self, segment: Segment) -> None:
        self.schedulers.drop(segment)


def _other(pid: int) -> str:
    """For people."""
    return f"SGLang's process {pid}"


def _left_s(deadline_s: float) -> float:
    """For a socket, to which 0 is something else."""
    return max(deadline_s - time.monotonic(), 0.001)


def _received(sock: socket.socket) -> _Scheduler | None:
    """What reports there; None: it died before it had. Raises TimeoutError."""
    pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        data = sock.recv(RECEIVE_BYTES)
    except BaseException:
        sock.close()
        raise
    if not data:
        sock.close()
        return None
    sock.settimeout(None)
    hello = unpack(data)
    assert isinstance(hello, Hello)
    return _Scheduler(sock=sock, pidfd=peer_pidfd(sock, pid), pid=pid, hello=hello)
