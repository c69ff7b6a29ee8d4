"""A private group of two processes that hand each other bytes, apart from any default group of theirs."""

from __future__ import annotations

import contextlib
import hmac
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from kdmesh.errors import Unavailable
from kdmesh.groups.meeting import PROOF_BYTES, first_line
from kdmesh.groups.octets import octets


class Backend(StrEnum):
    """What carries the bytes."""

    NCCL = "nccl"  # from one GPU's memory to another's
    GLOO = "gloo"  # from memory to memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seat:
    """One process's place in a group."""

    store: Store  # the place that the invitation leads to
    secret: bytes  # the invitation's
    rank: int  # 0 for who made the meeting, else 1
    backend: Backend
    device: torch.device  # where bytes lie on their way: a GPU for NCCL
    host: str  # the address of this machine that the other one reaches


class PairGroup:
    """Moves bytes from rank 0 to rank 1. One thread uses it; any other may `abort` it.

    Whoever reaches the store or the ports of this group can disturb it; without the secret it gets no byte.
    """

    def __init__(self, seat: Seat, *, timeout_s: float) -> None:
        """Join. Blocks until the other process has come, too, and has proven itself; for `timeout_s` at most with gloo.

        With NCCL each is waited for so long, but what lies between has no deadline here: connecting two that have both
        come; PairChannel waits no longer than it says.
        torch does that within the first transfer, which is of the proof; no later one connects anew.

        Raises:
            Unavailable: the other one does not come, cannot be reached or is another one.
        """
        self._device = seat.device
        # On the GPU's own stream, bytes would come only when all that was queued there before them is done.
        is_gpu = seat.device.type == "cuda"
        self._stream = torch.cuda.Stream(seat.device) if is_gpu else None  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._work: dist.Work | None = None
        self._is_aborted = False
        self._peer = 1 - seat.rank
        make = _nccl if seat.backend is Backend.NCCL else _gloo
        try:
            self._group: _Group | None = make(seat, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise Unavailable(f"no group of two: {first_line(error)}") from None
        try:
            self._prove(seat, timeout_s)
        except BaseException:
            self.close()
            raise

    def send(self, data: memoryview, timeout_s: float) -> None:
        """Return when `data` has been handed over. Blocks. Raises Unavailable when that fails, and breaks the group."""
        with self._apart():
            sent = octets(data).to(self._device)
            self._transfer(lambda group: group.send([sent], self._peer, 0), timeout_s)

    def receive(self, place: Tensor, timeout_s: float) -> None:
        """Fill `place`, octets on the CPU, with what is sent. Blocks. Raises as `send`."""
        with self._apart():
            landing = place if self._device.type == "cpu" else torch.empty_like(place, device=self._device)
            self._transfer(lambda group: group.recv([landing], self._peer, 0), timeout_s)
            if landing is not place:
                place.copy_(landing)  # waits, so that it is there when this returns

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

    def _apart(self) -> AbstractContextManager[object]:
        """Of what else the GPU does."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _transfer(self, begin: Callable[[_Group], dist.Work], timeout_s: float) -> None:
        with self._lock:
            if self._is_aborted or self._group is None:
                raise Unavailable("the group of two was ended")
            try:
                work = self._work = begin(self._group)
            except RuntimeError as error:  # the other one has left already
                self._is_aborted = True
                raise Unavailable(f"the group of two broke: {first_line(error)}") from None
        try:
            work.wait(timedelta(seconds=max(timeout_s, 0.001)))
        except RuntimeError as error:
            self.abort()
            raise Unavailable(f"the group of two broke: {first_line(error)}") from None
        finally:
            with self._lock:
                self._work = None
            del work  # it holds the connection open, and the error this frame: for as long as somebody has that

    def _prove(self, seat: Seat, timeout_s: float) -> None:
        """Exchange the halves of the secret."""
        halves = [seat.secret[:PROOF_BYTES], seat.secret[PROOF_BYTES:]]
        told = torch.zeros(PROOF_BYTES, dtype=torch.uint8)
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
    _await_peer(seat, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # So that waiting has a deadline. Otherwise a watchdog thread ends the process when the other one is gone.
    with _environment("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return cast(_Group, dist.ProcessGroupNCCL(seat.store, seat.rank, 2, options))


def _await_peer(seat: Seat, timeout: timedelta) -> None:
    """Return when both have come. gloo does this itself; NCCL's rank 0 would wait for the other without a deadline."""
    seat.store.set(f"came-{seat.rank}", "")
    seat.store.wait([f"came-{1 - seat.rank}"], timeout)


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
