"""The slab of a server: slots of shared memory, lent to sessions.

    async with SlabStore(limits, socket_path=path) as store:  # makes the memory, starts the broker
        session = store.open_session("job").token
        lease = store.try_acquire(session)  # None: no credit; on_free tells when to ask again
        engine_writes(lease.buffer[:n])
        handle = store.publish(lease, rows=rows, cols=cols, dtype=dtype)

The client then maps the slot through the broker (`shm_door`), or the server streams it to
the client under `store.reading`. Credits are slots: nothing unread is ever overwritten, and what may
happen to a slot is decided by the ledger alone (see ledger.py for the rules).

Everything here belongs to the event loop that entered the store: call it from there only, never
from a thread. The exception is `SlotLease.buffer`, which any thread may write between `try_acquire` and
`publish` or `cancel`. Callbacks (`on_free`, `on_session_end`) run on that loop, never inside a call.

A session is named by its token, everywhere. "Raises HandleGone" of a method that takes a session means:
the session is unknown or has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kdmesh.handles.ledger import Counters, Key, Ledger, SessionState, SlabLimits, SlotState
from kdmesh.handles.memory import Segment
from kdmesh.types import DType, Handle

log = logging.getLogger(__name__)

_ALIGNMENT_BYTES = 4096  # of a matrix in a shared segment: good for vector loads, and for registering with a device
_COPY_STEP_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What OpenSession answers with."""

    token: bytes  # 16 random bytes: identity and secret
    job: str


@dataclass(slots=True, kw_only=True, eq=False)
class SlotLease:
    """The right to write one slot, until `publish` or `cancel` takes it."""

    session: bytes
    slot: int
    buffer: memoryview  # writable bytes, the whole slot
    is_open: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A row-major matrix to be shared."""

    data: memoryview  # contiguous, rows * cols * dtype.size_bytes bytes
    rows: int
    cols: int
    dtype: DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The slab at one moment, for people and for metrics."""

    slots: Mapping[SlotState, int]  # how many in each state; together all
    slot_bytes: int
    sessions: tuple[SessionState, ...]
    orphans: int  # replaced memories, each slot_bytes, that a silent client may still map
    shared_bytes: int  # in shared segments (output heads)
    connections: int  # of the broker
    counters: Counters


class SlabStore:
    """Owns the memory, the ledger and the broker; an async context manager, entered once.

    Attributes:
        limits: as given.
        slot_bytes: size of a slot: limits.slot_bytes rounded up to whole pages.
        nonce: 16 random bytes that the broker tells; a client that was told the same by rpc is on this node.
        socket_path: where the broker listens.
        on_free: called after a slot came free; try_acquire may succeed now. Set it before sessions open.
        on_session_end: called with the token after a session ended, for whatever reason.
    """

    def __init__(
        self,
        limits: SlabLimits,
        *,
        socket_path: Path,
        allowed_uids: frozenset[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Users other than those in `allowed_uids` (None: this process's own) are turned away."""
        self.limits = limits
        self.slot_bytes = 0
        self.nonce = secrets.token_bytes(16)
        self.socket_path = socket_path
        self.on_free: Callable[[], None] = lambda: None
        self.on_session_end: Callable[[bytes], None] = lambda session: None
        self._allowed_uids = frozenset({os.getuid()}) if allowed_uids is None else allowed_uids
        self._clock = clock
        self._ledger = Ledger(limits, clock, self._freed)
        self._slots: list[Segment] = []
        self._shared: list[tuple[Segment, bytes, tuple[Handle, ...]]] = []
        self._told_free = False
        self._has_abandoned = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Make and touch all the memory, then listen and keep time.

        Raises:
            ConfigError: the memory is not there, the socket cannot be made, or a live server has it.
        """
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything; clients keep the bytes they have mapped."""
        raise NotImplementedError

    # Sessions

    def open_session(self, job: str) -> Session:
        """A new session; it ends after limits.lease_s without `keep_alive`."""
        raise NotImplementedError

    def is_open(self, session: bytes) -> bool:
        """Whether the session lives."""
        raise NotImplementedError

    def keep_alive(self, session: bytes) -> None:
        """Start the session's lease anew. Raises HandleGone."""
        raise NotImplementedError

    def close_session(self, session: bytes) -> None:
        """End a session and its handles; nothing happens when it has ended."""
        raise NotImplementedError

    # Filling

    def try_acquire(self, session: bytes) -> SlotLease | None:
        """A slot to write an answer in; None when none is free or the session has its share.

        Raises:
            HandleGone.
        """
        raise NotImplementedError

    def publish(self, lease: SlotLease, *, rows: int, cols: int, dtype: DType) -> Handle:
        """The handle to the matrix that lies at the start of lease.buffer. Nobody may write there any more.

        Raises:
            HandleGone: the session ended meanwhile; the slot has been taken back.
        """
        raise NotImplementedError

    def cancel(self, lease: SlotLease) -> None:
        """Take a slot back unpublished, once nobody writes it any more; nothing happens to a lease that has ended."""
        raise NotImplementedError

    # Reading

    @contextlib.contextmanager
    def reading(self, session: bytes, handle: Handle) -> Iterator[memoryview]:
        """The handle's bytes, which stay as they are inside the `with`, whatever becomes of the session.

        Counts as a claim. Take no view out of the `with`.

        Raises:
            HandleGone: also when the handle is forged, stale, released or another session's.
            InvalidRequest: its shape or dtype are not those that were answered.
        """
        raise NotImplementedError
        yield

    def release(self, session: bytes, key: Key) -> None:
        """End a handle; nothing happens when it has ended, was never this session's, or is shared."""
        raise NotImplementedError

    async def add_shared_segment(self, matrices: Sequence[Matrix]) -> tuple[Handle, ...]:
        """Copy matrices to a segment of their own that any session may read until the store closes.

        Raises:
            ConfigError: there is not enough memory.
        """
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        """The slab as it is now."""
        raise NotImplementedError
