"""The slab of a server: slots of shared memory, lent to sessions.

    async with SlabStore(limits, socket_path=path) as store:  # makes the memory, starts the broker
        session = store.open_session("job")
        lease = store.try_acquire(session)  # None: no credit; on_free tells when to ask again
        engine_writes(lease.buffer[:n])
        handle = store.publish(lease, rows=rows, cols=cols, dtype=dtype)

The client then maps the slot through the broker (`shm_door`), or the server streams it to
the client under `store.reading`. Credits are slots: nothing unread is ever overwritten, and what may
happen to a slot is decided by the ledger alone (see ledger.py for the rules).

Everything here belongs to the event loop that entered the store: call it from there only, never
from a thread. The exception is `SlotLease.buffer`, which any thread may write between `try_acquire` and
`publish` or `cancel`. Callbacks (`on_free`, `on_session_end`) run on that loop, never inside a call.

A session is named by its token. "Raises HandleGone" of a method that takes one: it is unknown or has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.handles.key import Key
from kdmesh.handles.slab.broker import Broker
from kdmesh.handles.slab.ledger import Ledger
from kdmesh.handles.slab.limits import SlabLimits
from kdmesh.handles.slab.memory import (
    Segment,
    SegmentWriter,
    create_segment_in_thread,
    require_available,
    whole_pages,
)
from kdmesh.handles.slab.renewal import Renewal
from kdmesh.handles.slab.reports import SessionEnd, SlotState, Snapshot
from kdmesh.handles.slab.shared import Matrix, Shape, SharedSegments
from kdmesh.types import DType, Handle

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class SlotLease:
    """The right to write one slot, until `publish` or `cancel` takes it."""

    session: bytes
    slot: int
    buffer: memoryview  # writable bytes, the whole slot
    segment: int  # number of its memory, for processes that write it too
    is_open: bool = True

    def end(self) -> None:
        """Nobody writes any more. The store calls it; a view that was made of the buffer is not found out."""
        self.is_open = False
        with contextlib.suppress(BufferError):
            self.buffer.release()


class SlabStore:
    """Owns the memory, the ledger and the broker; an async context manager, entered once.

    Attributes:
        limits: as given.
        slot_bytes: size of a slot: limits.slot_bytes rounded up to whole pages.
        slots: the memory of every slot, as it is now; for looking only.
        nonce: 16 random bytes that the broker tells; a client that was told the same by rpc is on this node.
        socket_path: where the broker listens.
        on_free: called after a slot came free; try_acquire may succeed now. Set it before sessions open.
        on_session_end: called after a session ended, for whatever reason.
    """

    def __init__(self, limits: SlabLimits, *, socket_path: Path, writer: SegmentWriter | None = None) -> None:
        """A store that is not entered yet.

        Args:
            limits: how much is lent, and for how long.
            socket_path: where the broker is to listen.
            writer: other processes that write the slots; it is shown every new one.
        """
        self.limits = limits
        self.slot_bytes = whole_pages(limits.slot_bytes)
        self.nonce = secrets.token_bytes(16)
        self.socket_path = socket_path
        self.on_free: Callable[[], None] = lambda: None
        self.on_session_end: Callable[[SessionEnd], None] = lambda end: None
        self._writer = writer
        self._ledger = Ledger(limits, time.monotonic, self._freed)
        self.slots: list[Segment] = []
        self._shared = SharedSegments(first_number=limits.slots)
        self._is_collected = asyncio.Event()  # set whenever an answer may have been claimed or ended
        self._is_free_told = True
        self._renewal = Renewal(self._ledger, self.slots, writer)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Make and touch all the memory, then listen and keep time.

        Raises:
            ConfigError: the memory is not there, the socket cannot be made, or a live server has it.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._close_memory)
            try:
                require_available(self.limits.slots * self.slot_bytes)
                for _ in range(self.limits.slots):
                    self.slots.append(await create_segment_in_thread(self.slot_bytes, self._writer))
            except OSError as error:
                raise ConfigError(
                    f"cannot make {self.limits.slots} slots of {self.slot_bytes} bytes: {error.strerror or error}"
                ) from None
            self._broker = Broker(self, nonce=self.nonce, path=self.socket_path)
            stack.callback(self._broker.close)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(tasks.create_task(self._sweep_forever()).cancel)
            stack.callback(tasks.create_task(self._renewal.run()).cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything; clients keep the bytes they have mapped."""
        await self._stack.aclose()

    # Sessions

    def open_session(self, job: str) -> bytes:
        """A new session's identity and secret, 16 random bytes; it ends after limits.lease_s without `keep_alive`."""
        return self._ledger.open_session(job)

    def is_open(self, session: bytes) -> bool:
        """Whether the session lives."""
        return self._ledger.is_open(session)

    def job(self, session: bytes) -> str:
        """The name the session was opened with. Raises HandleGone."""
        return self._ledger.job(session)

    def keep_alive(self, session: bytes) -> None:
        """Start the session's lease anew. Raises HandleGone."""
        self._ledger.keep_alive(session)

    def close_session(self, session: bytes) -> None:
        """End a session and its handles; nothing happens when it has ended."""
        if end := self._ledger.end_session(session):
            self._ended(end, "closed")

    # Filling

    def may_acquire(self, session: bytes) -> bool:
        """Whether `try_acquire` would give a slot now. When other jobs map all that is free, one gets new memory."""
        may = self._ledger.may_acquire(session)
        if not may and self._ledger.make_way(session):
            self._renewal.is_due.set()
        return may

    def try_acquire(self, session: bytes) -> SlotLease | None:
        """A slot to write an answer in; None when none is free or the session has its share.

        Raises:
            HandleGone.
        """
        slot = self._ledger.acquire(session)
        if slot is None:
            self.may_acquire(session)
            return None
        memory = self.slots[slot]
        return SlotLease(session=session, slot=slot, buffer=memory.writable[:], segment=memory.number)

    def publish(self, lease: SlotLease, *, rows: int, cols: int, dtype: DType) -> Handle:
        """The handle to the matrix that lies at the start of lease.buffer. Nobody may write there any more.

        A client that has this slot mapped holds it from now on, and need not ask the broker for it.

        Raises:
            HandleGone: the session ended meanwhile; the slot has been taken back.
        """
        assert lease.is_open
        assert 0 < rows * cols * dtype.size_bytes <= self.slot_bytes
        lease.end()
        holder = self._broker.holder_of(lease.session, lease.slot, self._ledger.epoch(lease.slot))
        return self._ledger.publish(lease.slot, rows=rows, cols=cols, dtype=dtype, holder=holder)

    def cancel(self, lease: SlotLease) -> None:
        """Take a slot back unpublished, once nobody writes it any more; nothing happens to a lease that has ended."""
        if lease.is_open:
            lease.end()
            self._ledger.cancel(lease.slot)
            self._renewal.slot_returned()

    # Reading

    def find(self, session: bytes, key: Key) -> tuple[Segment, Handle]:
        """Where a handle points, and how it was answered. Raises HandleGone as the ledger does."""
        if key.segment < len(self.slots):
            return self.slots[key.segment], self._ledger.find(session, key)
        self._ledger.job(session)
        return self._shared.find(key)

    def told(self, handle: Handle) -> None:
        """A client was told how to read a handle's memory whenever it likes."""
        self._ledger.told(handle)

    async def wait_collected(self) -> None:
        """Return when no answer waits to be claimed."""
        while self.slots_by_state()[SlotState.READY]:
            self._is_collected.clear()
            await self._is_collected.wait()

    @contextlib.contextmanager
    def reading(self, session: bytes, handle: Handle) -> Iterator[memoryview]:
        """The handle's bytes, which stay as they are inside the `with`, whatever becomes of the session.

        Counts as a claim. Take no view out of the `with`.

        Raises:
            HandleGone: also when the handle is forged, stale, released or another session's.
            InvalidRequest: its shape or dtype are not those that were answered.
        """
        segment, answered = self.find(session, handle)
        if handle != answered:
            raise InvalidRequest(f"the handle says {_shape(handle)}; answered was {_shape(answered)}")
        staying = self._reading_slot(handle) if handle.segment < len(self.slots) else self._shared.reading(handle)
        with staying, segment.writable[handle.offset_bytes :][: handle.size_bytes].toreadonly() as view:
            yield view

    @contextlib.contextmanager
    def _reading_slot(self, handle: Handle) -> Iterator[None]:
        self._ledger.begin_read(handle)
        self._is_collected.set()
        try:
            yield
        finally:
            self._ledger.end_read(handle)
            self._renewal.slot_returned()

    def release(self, session: bytes, key: Key) -> bool:
        """End a handle for this session; False, and nothing happens, when it has ended, or was never this session's."""
        was_live = self._ledger.release(session, key) or self._shared.release(session, key)
        self._is_collected.set()
        self._renewal.slot_returned()
        return was_live

    # Shared segments

    async def add_shared_segment(self, matrices: Sequence[Matrix]) -> tuple[Handle, ...]:
        """Copy matrices to a segment of their own that any session may read until it is retired.

        Raises:
            ConfigError: there is not enough memory.
        """
        try:
            return await self._shared.add(matrices)
        except OSError as error:
            raise ConfigError(f"cannot share {len(matrices)} matrices: {error.strerror}") from None

    async def reserve_shared_segment(self, shapes: Sequence[Shape]) -> tuple[Handle, ...]:
        """The same with the bytes to come, by `fill_shared_segment`; nobody may be told of the handles before.

        Raises:
            ConfigError: there is not enough memory.
        """
        try:
            return await self._shared.reserve(shapes)
        except OSError as error:
            raise ConfigError(f"cannot share {len(shapes)} matrices: {error.strerror}") from None

    async def fill_shared_segment(self, handles: Sequence[Handle], data: Sequence[memoryview]) -> None:
        """Copy the bytes of matrices to the segment that was reserved for them."""
        await self._shared.fill(handles, data)

    def retire_shared_segment(self, handles: Sequence[Handle]) -> None:
        """Give a segment up once no session needs it any more that it was lent to."""
        self._shared.retire(handles)

    def lend(self, session: bytes, handles: Sequence[Handle]) -> None:
        """A session is told of a shared segment's handles: they stay until it releases them, is told of others or ends.

        Raises:
            HandleGone.
        """
        self._ledger.job(session)
        self._shared.lend(session, handles)

    def slots_by_job(self) -> Mapping[str, int]:
        """Slots with what each job asked for, also those that a client of it maps whose session has ended."""
        return self._ledger.slots_of

    def slots_by_state(self) -> Mapping[SlotState, int]:
        """How many slots are in each state; together all of them."""
        return self._ledger.slots_by_state()

    def snapshot(self) -> Snapshot:
        """The slab as it is now."""
        return Snapshot(
            slots=self.slots_by_state(),
            slot_bytes=self.slot_bytes,
            sessions=self._ledger.sessions(),
            orphans=self._ledger.num_orphans,
            shared_bytes=self._shared.size_bytes,
            connections=self._broker.num_connections,
            counters=replace(self._ledger.counters),
        )

    async def replace_memory(self) -> None:
        """Others write from now on, who cannot map what was made before them: the writer has changed.

        Returns when every free slot has new memory, or there is none to be had. What is lent stays as it is, and its
        slot gets new memory when it comes back.
        """
        await self._renewal.replace_all()

    # For the broker

    def claim(self, session: bytes, key: Key, holder: int) -> Segment:
        """The segment that `holder` is to map. Raises HandleGone as the ledger does."""
        self._is_collected.set()
        segment, _ = self.find(session, key)
        if key.segment < len(self.slots):
            self._ledger.claim(session, key, holder)
        return segment

    def holder_gone(self, holder: int) -> None:
        """Nothing that this connection claimed is read any more."""
        self._ledger.holder_gone(holder)
        self._renewal.is_due.set()

    def process_died(self, holder: int, session: bytes) -> None:
        """The same, and its session has no client."""
        if end := self._ledger.process_died(holder, session):
            self._ended(end, "process died")
        self._renewal.is_due.set()

    # Inside

    def _ended(self, end: SessionEnd, reason: str) -> None:
        log.info("session ended", extra={"job": end.job, "reason": reason, "abandoned_slots": end.abandoned})
        self._shared.end_session(end.token)
        asyncio.get_running_loop().call_soon(self.on_session_end, end)
        self._renewal.is_due.set()

    def _freed(self) -> None:
        self._is_collected.set()
        if self._is_free_told:  # once for all slots that come free in one go
            self._is_free_told = False
            asyncio.get_running_loop().call_soon(self._tell_free)

    def _tell_free(self) -> None:
        self._is_free_told = True
        self.on_free()

    async def _sweep_forever(self) -> None:
        interval_s = min(self.limits.lease_s, self.limits.claim_s) / 10
        while True:
            begin = time.monotonic()
            await asyncio.sleep(interval_s)
            late_s = time.monotonic() - begin - interval_s
            if late_s > interval_s:  # this loop stood still, and may not have heard those who spoke
                self._ledger.excuse(late_s)
            for end in self._ledger.sweep():
                self._ended(end, "silent")
            self._is_collected.set()
            self._renewal.is_due.set()

    def _close_memory(self) -> None:
        self._shared.close()
        for segment in self.slots:
            segment.close()


def _shape(handle: Handle) -> str:
    return f"{handle.rows} x {handle.cols} {handle.dtype} at {handle.offset_bytes}"
