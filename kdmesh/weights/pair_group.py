"""A private group of two processes that hand each other bytes, apart from any default group of theirs."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.weights.doors import Door

_PROOF_BYTES = 16
SECRET_BYTES = 2 * _PROOF_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What the second process of a group needs to join it."""

    store_address: str  # host:port
    secret: bytes  # the first process proves itself with its first half, the second with the other


class Meeting:
    """Where the second process of one group finds the first: a store on a port of its own."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        """Listen on one address of this machine, on any free port. Raises ConfigError when it is none."""
        listener = _listen(host)
        port = listener.getsockname()[1]
        self.store: Store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),  # or it would listen on every address
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.invitation = Invitation(store_address=address, secret=secrets.token_bytes(SECRET_BYTES))


def check_own_address(host: str) -> None:
    """Raises ConfigError when this machine cannot listen there."""
    _listen(host).close()


def _listen(host: str) -> socket.socket:
    """On any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from None


def visit(invitation: Invitation, *, timeout_s: float) -> Store:
    """The store that an invitation names. Blocks. Raises Unavailable when it cannot be reached."""
    host, port = split_address(invitation.store_address)
    try:
        # Asked first, because torch tries for as long as it may, and writes pages to stderr.
        socket.create_connection((host, port), timeout=timeout_s).close()
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except OSError as error:
        raise Unavailable(f"no connection to {invitation.store_address}: {error}") from None
    except RuntimeError as error:
        raise Unavailable(f"no store at {invitation.store_address}: {_first_line(error)}") from None


def split_address(address: str) -> tuple[str, int]:
    """host and port of host:port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches `host`. Raises Unavailable when there is no way."""
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unavailable(f"no way to {host}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seat:
    """One process's place in a group."""

    store: Store  # the meeting's
    secret: bytes  # the invitation's
    rank: int  # 0 for who made the meeting, else 1
    door: Door  # GLOO or NCCL
    device: torch.device  # where bytes lie on their way: a GPU for NCCL
    host: str  # the address of this machine that the other one reaches


class PairGroup:
    """Moves bytes from rank 0 to rank 1. One thread uses it; any other may `abort` it.

    Whoever reaches the store or the ports of this group can disturb it; without the secret it gets no byte.
    """

    def __init__(self, seat: Seat, *, timeout_s: float) -> None:
        """Join. Blocks until the other process has come, too, and has proven itself; for `timeout_s` at most.

        Raises:
            Unavailable: the other one does not come, cannot be reached or is another one.
        """
        self._device = seat.device
        self._lock = threading.Lock()
        self._work: dist.Work | None = None
        self._is_aborted = False
        self._peer = 1 - seat.rank
        make = _nccl if seat.door is Door.NCCL else _gloo
        try:
            self._group: _Group | None = make(seat, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise Unavailable(f"no group of two: {_first_line(error)}") from None
        try:
            self._prove(seat, timeout_s)
        except BaseException:
            self.close()
            raise

    def send(self, data: memoryview, timeout_s: float) -> None:
        """Return when `data` has been handed over. Blocks. Raises Unavailable when that fails, and breaks the group."""
        octets = torch.frombuffer(data, dtype=torch.uint8).to(self._device)
        self._transfer(lambda group: group.send([octets], self._peer, 0), timeout_s)

    def receive(self, place: Tensor, timeout_s: float) -> None:
        """Fill `place`, octets on the CPU, with what is sent. Blocks. Raises as `send`."""
        octets = place if self._device.type == "cpu" else torch.empty_like(place, device=self._device)
        self._transfer(lambda group: group.recv([octets], self._peer, 0), timeout_s)
        if octets is not place:
            place.copy_(octets)

    def abort(self) -> None:
        """Break the group; a thread that sends or receives gets Unavailable at once."""
        with self._lock:
            self._is_aborted = True
            work, group = self._work, self._group
        if work is None or group is None:
            return
        with contextlib.suppress(RuntimeError):
            if self._device.type == "cuda":
                group.abort()
            else:
                # gloo's own abort wakes nobody. It closes a connection on which somebody has waited too long.
                work.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Leave the group: what it has open is closed. In the thread that uses it; the other process is told."""
        self._group = None

    def _transfer(self, begin: Callable[[_Group], dist.Work], timeout_s: float) -> None:
        with self._lock:
            if self._is_aborted or self._group is None:
                raise Unavailable("the group of two was ended")
            work = self._work = begin(self._group)
        try:
            work.wait(timedelta(seconds=max(timeout_s, 0.001)))
        except RuntimeError as error:
            self.abort()
            raise Unavailable(f"the group of two broke: {_first_line(error)}") from None
        finally:
            with self._lock:
                self._work = None

    def _prove(self, seat: Seat, timeout_s: float) -> None:
        """Exchange the halves of the secret."""
        halves = [seat.secret[:_PROOF_BYTES], seat.secret[_PROOF_BYTES:]]
        told = torch.zeros(_PROOF_BYTES, dtype=torch.uint8)
        own = memoryview(bytearray(halves[seat.rank]))
        if seat.rank == 0:
            self.send(own, timeout_s)
            self.receive(told, timeout_s)
        else:
            self.receive(told, timeout_s)
            self.send(own, timeout_s)
        if not hmac.compare_digest(bytes(told.numpy()), halves[self._peer]):
            raise Unavailable("the other process of the group does not know its secret")


class _Group(Protocol):
    """What gloo's and NCCL's groups have in common."""

    def send(self, tensors: list[Tensor], dstRank: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int) -> dist.Work: ...

    def abort(self) -> None: ...


def _gloo(seat: Seat, timeout: timedelta) -> _Group:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs name it otherwise
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=seat.host)]
    options._timeout = timeout
    options._threads = 1
    return cast(_Group, dist.ProcessGroupGloo(seat.store, seat.rank, 2, options))


def _nccl(seat: Seat, timeout: timedelta) -> _Group:
    """Its connections are made over the interfaces that NCCL finds, or NCCL_SOCKET_IFNAME names."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # So that waiting has a deadline. Otherwise a watchdog thread ends the process when the other one is gone.
    with _environment("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return cast(_Group, dist.ProcessGroupNCCL(seat.store, seat.rank, 2, options))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first_line(error: RuntimeError) -> str:
    """Without the place in torch's source that it begins with."""
    line = str(error).partition("\n")[0]
    return line.partition("] ")[2] if line.startswith("[/") else line
