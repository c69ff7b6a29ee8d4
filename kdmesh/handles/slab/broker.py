"""Lends memory to processes of this node, over a Unix socket.

messages.py is the protocol. The broker decides nothing: it passes what clients ask to a
`Lender`, and tells it when a client's connection or process ends:

  process dead   its pidfd says so: SO_PEERPIDFD (Linux 6.5, right across namespaces), else pidfd_open of the
                 SO_PEERCRED pid. It fires although a forked child still has the socket open.
  hung up        the socket closed. Where there is no pidfd this is also all that is known of a death.
  silent         not seen here; the lease of the session ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import socket
import struct
from pathlib import Path
from typing import Protocol

from kdmesh.errors import ConfigError, HandleGone
from kdmesh.handles.key import Key
from kdmesh.handles.slab import messages
from kdmesh.handles.slab.memory import Segment
from kdmesh.handles.slab.messages import Op, Reply, Request, Status
from kdmesh.handles.slab.peers import peer_pidfd
from kdmesh.unix_path import unix_address

log = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPT_AGAIN_S = 1.0
# A dying process closes its sockets a moment before its pidfd tells; a living one that hangs up is watched no longer.
_DEATH_FOLLOWS_S = 5.0


class Lender(Protocol):
    """What the broker needs of the store. `holder` is the number of a connection, never used twice."""

    def is_open(self, session: bytes) -> bool:
        """Whether the session lives."""

    def claim(self, session: bytes, key: Key, holder: int) -> Segment:
        """The segment to map. Raises HandleGone."""

    def release(self, session: bytes, key: Key) -> object:
        """The handle is not read any more. What this returns is not looked at."""

    def holder_gone(self, holder: int) -> None:
        """Nothing that this connection claimed is read any more."""

    def process_died(self, holder: int, session: bytes) -> None:
        """The same, and its session has no client."""


class Broker:
    """Listens at `path` until closed. Only this process's own user is heard."""

    def __init__(self, lender: Lender, *, nonce: bytes, path: Path) -> None:
        """Raises ConfigError when the socket cannot be made, or a live server has it."""
        self.lender = lender
        self.nonce = nonce
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._connections: set[_Connection] = set()
        self._by_session: dict[bytes, set[_Connection]] = {}
        self._listener = _listen(path)
        self._inode = path.stat().st_ino
        self._loop.add_reader(self._listener, self._accept)

    @property
    def num_connections(self) -> int:
        """Clients that are connected, or left in the last seconds."""
        return len(self._connections)

    def holder_of(self, session: bytes, segment: int, epoch: int) -> int | None:
        """The session's connection, when it is its only one and was sent this segment in this epoch."""
        connections = self._by_session.get(session, ())
        if len(connections) != 1:
            return None
        (connection,) = connections
        return connection.number if connection.has(segment, epoch) else None

    def introduced(self, session: bytes, connection: _Connection) -> None:
        """A connection speaks for a session from now on."""
        self._by_session.setdefault(session, set()).add(connection)

    def hung_up(self, session: bytes, connection: _Connection) -> None:
        """A connection speaks for its session no more."""
        connections = self._by_session.get(session, set())
        connections.discard(connection)
        if not connections:
            self._by_session.pop(session, None)

    def close(self) -> None:
        """Hang up on everybody; the lender hears nothing of it."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for connection in tuple(self._connections):
            connection.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # not if somebody put theirs in its place
                self._path.unlink()

    def forget(self, connection: _Connection) -> None:
        """A connection is over."""
        self._connections.discard(connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: the caller stays in the backlog until there are some
            log.warning("broker cannot accept", extra={"error": str(error)})
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_AGAIN_S, self._listen_again)
            return
        sock.setblocking(False)
        pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            log.warning("broker turned a user away", extra={"uid": uid, "pid": pid})
            sock.close()
            return
        self._connections.add(_Connection(self, sock, number=next(self._numbers), pidfd=peer_pidfd(sock, pid)))

    def _listen_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)


class _Connection:
    """One client. Its number is the ledger's `holder`."""

    def __init__(self, broker: Broker, sock: socket.socket, *, number: int, pidfd: int | None) -> None:
        self._broker = broker
        self._sock = sock
        self.number = number
        self._pidfd = pidfd
        self._session = b""  # until HELLO
        self._sent: dict[int, int] = {}  # segment -> epoch whose descriptor the client has
        self._loop = asyncio.get_running_loop()
        self._end_of_watch: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock, self._readable)
        if pidfd is not None:
            self._loop.add_reader(pidfd, self._died)

    def has(self, segment: int, epoch: int) -> bool:
        """Whether the client was sent this segment in this epoch."""
        return self._sent.get(segment) == epoch

    def close(self) -> None:
        """Let go of socket and pidfd."""
        self._hang_up()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._end_of_watch is not None:
            self._end_of_watch.cancel()
        self._broker.forget(self)

    def _hang_up(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
            self._broker.hung_up(self._session, self)

    def _died(self) -> None:
        self.close()
        self._broker.lender.process_died(self.number, self._session)

    def _ended(self) -> None:
        """The client hung up or must be hung up on."""
        if self._pidfd is None:
            self._died()
            return
        self._hang_up()
        self._broker.lender.holder_gone(self.number)
        self._end_of_watch = self._loop.call_later(_DEATH_FOLLOWS_S, self.close)

    def _readable(self) -> None:
        try:
            message = self._sock.recv(messages.RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._ended()
            return
        request = Request.unpack(message)
        try:
            is_served = request is not None and self._serve(request)
        except OSError as error:  # the client does not read its replies, or is gone
            log.warning("broker cannot reply", extra={"error": str(error)})
            self._ended()
            return
        if not is_served:
            log.warning("broker got no request", extra={"length": len(message), "first_byte": message[0]})
            self._ended()

    def _serve(self, request: Request) -> bool:
        if bool(self._session) == (request.op is Op.HELLO):
            return False  # HELLO comes first, and once
        match request.op:
            case Op.HELLO:
                return self._hello(request)
            case Op.CLAIM:
                self._claim(request)
            case Op.RELEASE:
                self._broker.lender.release(self._session, request)
        return True

    def _hello(self, request: Request) -> bool:
        if request.segment != messages.VERSION:
            return False
        if not self._broker.lender.is_open(request.token):
            self._sock.send(Reply(Status.GONE).pack())
            return True
        self._session = request.token
        self._broker.introduced(self._session, self)
        self._sock.send(Reply(Status.OK, nonce=self._broker.nonce).pack())
        return True

    def _claim(self, request: Request) -> None:
        try:
            segment = self._broker.lender.claim(self._session, request, self.number)
        except HandleGone:
            self._sock.send(Reply(Status.GONE).pack())
            return
        reply = Reply(Status.OK, size_bytes=segment.size_bytes).pack()
        if self.has(request.segment, request.epoch):
            self._sock.send(reply)
        else:
            socket.send_fds(self._sock, [reply], [segment.fd])
            self._sent[request.segment] = request.epoch


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)  # servers that start at the same time take turns
            _remove_stale(path)
            os.fchmod(sock.fileno(), 0o600)  # before bind, so that the socket never exists with other rights
            with unix_address(path) as address:
                sock.bind(address)
            sock.listen(_BACKLOG)
        finally:
            os.close(directory)
    except (OSError, ConfigError) as error:
        sock.close()
        raise ConfigError(f"cannot listen at {path}: {error}") from None
    sock.setblocking(False)
    return sock


def _remove_stale(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError("something that is not a socket lies there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1.0)
        try:
            with unix_address(path) as address:
                probe.connect(address)
        except ConnectionRefusedError:  # its server is dead
            path.unlink()
            return
    raise ConfigError("a live server listens there")
