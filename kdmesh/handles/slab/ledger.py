"""Who may touch which slot, as a state machine without any I/O.

  FREE ----acquire---> FILLING --publish--> READY --claim/read--> HELD --release--> FREE
                          |cancel -> FREE     |unclaimed -> FREE    |
                          +--publish to who has it mapped---------->|
                                                                    | session ended, holder still has it mapped
                                    FREE <--renew (new epoch)-- ABANDONED --holder gone or let go--> FREE

A *session* is one client. A *holder* is a client's connection to the broker: the sign that
somebody has memory mapped. A slot goes back to FREE only when nobody can touch its memory
any more: not an engine that fills it, not a holder that maps it, not a stream that reads it.

The end of a session, by silence, by its own wish or by the death of its process, ends its handles.
What a holder that may be alive still has mapped is never written again: the slot is ABANDONED until
it gets other memory (`renew`) or the holder goes. Memory replaced in this way is an *orphan* until its
holder goes; there are at most `max_abandoned` of them.

Memory that a client of one job may still map is lent to that job alone, until the slot gets other memory (`make_way`).
Memory is *worn* when whoever wrote it is gone (`wear_out`): it can be read, and instead of FREE its slot is
ABANDONED, by nobody, until it gets other memory.
"""

from __future__ import annotations

import hmac
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kdmesh.errors import HandleGone
from kdmesh.handles.key import Key
from kdmesh.handles.slab.free_slots import FreeSlots
from kdmesh.handles.slab.limits import SlabLimits
from kdmesh.handles.slab.reports import Counters, SessionEnd, SessionState, SlotState
from kdmesh.types import DType, Handle


@dataclass(slots=True, kw_only=True)
class _Session:
    job: str
    heard_at: float
    slots: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class _Slot:
    state: SlotState = SlotState.FREE
    epoch: int = 1
    session: bytes = b""  # whose it is; it may have ended
    job: str | None = None  # of that session; None while it is FREE
    handle: Handle | None = None  # what was answered; None before that, and once it is released
    ready_at: float = 0.0
    holder: int | None = None  # who has it mapped
    readers: int = 0  # streams that read it
    mapped_by: str | None = None  # job whose clients may still map its memory, also when it is FREE
    is_worn: bool = False  # its memory must be replaced before it is lent again


@dataclass(frozen=True, slots=True, kw_only=True)
class _Orphan:
    holder: int | None
    token: bytes


class Ledger:
    """The books of a slab. Not thread-safe: it belongs to one event loop.

    Args:
        limits: how much and for how long.
        clock: seconds that only grow.
        on_free: called from within, whenever a slot came free; it must only schedule work.
    """

    def __init__(self, limits: SlabLimits, clock: Callable[[], float], on_free: Callable[[], None]) -> None:
        self._limits = limits
        self._clock = clock
        self._on_free = on_free
        self._sessions: dict[bytes, _Session] = {}
        self._slots = [_Slot() for _ in range(limits.slots)]
        self._free = FreeSlots(limits.slots)
        self._orphans: dict[tuple[int, int], _Orphan] = {}  # by (segment, epoch)
        self._slots_of: Counter[str] = Counter()  # by job
        self.counters = Counters()

    # Sessions

    def open_session(self, job: str) -> bytes:
        """The token of a new session: 16 random bytes."""
        token = secrets.token_bytes(16)
        self._sessions[token] = _Session(job=job, heard_at=self._clock())
        self.counters.sessions_opened += 1
        return token

    def is_open(self, session: bytes) -> bool:
        """Whether the session lives."""
        return session in self._sessions

    def job(self, session: bytes) -> str:
        """The name the session was opened with. Raises HandleGone when it has ended."""
        return self._session(session).job

    def keep_alive(self, session: bytes) -> None:
        """Start the session's lease anew. Raises HandleGone when it has ended."""
        self._session(session).heard_at = self._clock()

    def excuse(self, seconds: float) -> None:
        """Do not count that much silence: it was this process that was held up."""
        for session in self._sessions.values():
            session.heard_at += seconds
        for slot in self._slots:
            slot.ready_at += seconds

    def end_session(self, session: bytes) -> SessionEnd | None:
        """End a session's handles; None when it had ended already."""
        ended = self._sessions.pop(session, None)
        if ended is None:
            return None
        abandoned = 0
        for index in ended.slots:
            slot = self._slots[index]
            if slot.state is SlotState.FILLING:
                continue  # the engine may be writing: publish or cancel frees it
            if slot.holder is None:
                self._end_handle(index)
            else:
                slot.state = SlotState.ABANDONED
                abandoned += 1
        self.counters.abandoned += abandoned
        return SessionEnd(token=session, job=ended.job, abandoned=abandoned)

    def holder_gone(self, holder: int) -> None:
        """A holder has nothing mapped any more: what only it could touch comes free."""
        for index, slot in enumerate(self._slots):
            if slot.holder == holder:
                self._end_handle(index)
        self._orphans = {key: orphan for key, orphan in self._orphans.items() if orphan.holder != holder}

    def process_died(self, holder: int, session: bytes) -> SessionEnd | None:
        """The holder's process is dead, and its session with it; None when that had ended before."""
        self.holder_gone(holder)
        end = self.end_session(session)
        self.counters.sessions_died += end is not None
        return end

    def sweep(self) -> list[SessionEnd]:
        """End what is overdue; returns the sessions among it."""
        now = self._clock()
        for index, slot in enumerate(self._slots):
            if slot.state is SlotState.READY and now - slot.ready_at > self._limits.claim_s:
                self._end_handle(index)
                self.counters.unclaimed += 1
        silent = [token for token, s in self._sessions.items() if now - s.heard_at > self._limits.lease_s]
        self.counters.sessions_expired += len(silent)
        return [end for token in silent if (end := self.end_session(token))]

    # Filling

    def may_acquire(self, session: bytes) -> bool:
        """Whether `acquire` would give a slot now."""
        owner = self._sessions.get(session)
        return owner is not None and self._free.has(owner.job) and len(owner.slots) < self._limits.slots_per_session

    def acquire(self, session: bytes) -> int | None:
        """A free slot, now FILLING; None when there is none or the session has its share.

        Raises:
            HandleGone: the session has ended.
        """
        owner = self._session(session)
        if not self.may_acquire(session):
            return None
        index = self._free.take(owner.job)
        slot = self._slots[index]
        slot.state, slot.session, slot.job = SlotState.FILLING, session, owner.job
        owner.slots.add(index)
        self._slots_of[owner.job] += 1
        self.counters.acquired += 1
        return index

    def epoch(self, index: int) -> int:
        """Generation of the slot's memory."""
        return self._slots[index].epoch

    def publish(self, index: int, *, rows: int, cols: int, dtype: DType, holder: int | None = None) -> Handle:
        """A new handle to what was written; nothing writes the slot until its handle has ended.

        With `holder`, who has the slot's memory mapped, it is claimed by them already.

        Raises:
            HandleGone: the session ended meanwhile; the slot is free.
        """
        slot = self._slots[index]
        assert slot.state is SlotState.FILLING
        if slot.session not in self._sessions:
            self._end_handle(index)
            raise HandleGone("the session ended before its answer was ready")
        slot.state, slot.ready_at = SlotState.READY, self._clock()
        slot.handle = Handle(
            segment=index,
            epoch=slot.epoch,
            token=secrets.token_bytes(16),
            offset_bytes=0,
            rows=rows,
            cols=cols,
            dtype=dtype,
            is_claimed=holder is not None,
        )
        if holder is not None:
            self._hold(slot, slot.handle, holder)
        return slot.handle

    def cancel(self, index: int) -> None:
        """Give a FILLING slot back; nobody writes it any more."""
        assert self._slots[index].state is SlotState.FILLING
        self._end_handle(index)

    # Reading

    def find(self, session: bytes, key: Key) -> Handle:
        """The handle as it was answered.

        Raises:
            HandleGone: the session has ended, or the handle is forged, stale, released or another session's.
        """
        self._session(session)
        handle = self._slots[key.segment].handle if self._is_answer(session, key) else None
        if handle is None:
            raise HandleGone(f"the handle to segment {key.segment} was released, or its lease ended, or it is forged")
        return handle

    def claim(self, session: bytes, key: Key, holder: int) -> None:
        """`holder` maps the slot from now on, until it releases the handle or goes.

        Raises:
            HandleGone: as `find`, or the handle was claimed before.
        """
        answered = self.find(session, key)
        slot = self._slots[answered.segment]
        if slot.holder is not None:
            raise HandleGone("the handle was claimed before; it can be mapped once")
        self._hold(slot, answered, holder)

    def told(self, handle: Handle) -> None:
        """A client knows how to read the slot of a handle that was just found, without asking again."""
        if handle.segment < len(self._slots):
            self._slots[handle.segment].mapped_by = self._slots[handle.segment].job

    def begin_read(self, handle: Handle) -> None:
        """Keep the slot of a handle that was just found as it is until `end_read`, whatever becomes of the session."""
        slot = self._slots[handle.segment]
        assert slot.handle == handle
        slot.state = SlotState.HELD
        slot.readers += 1
        self.counters.streamed += 1

    def end_read(self, handle: Handle) -> None:
        """The other end of one `begin_read`."""
        slot = self._slots[handle.segment]
        if slot.epoch != handle.epoch:
            return  # the slot has other memory since; what was read is an orphan
        slot.readers -= 1
        if slot.handle is None:
            self._end_handle(handle.segment)

    def release(self, session: bytes, key: Key) -> bool:
        """End a handle; False, and nothing happens, when it has ended, or was never this session's."""
        place = key.segment, key.epoch
        if (orphan := self._orphans.get(place)) is not None and hmac.compare_digest(orphan.token, key.token):
            del self._orphans[place]
        elif self._is_answer(session, key):
            self._end_handle(key.segment)
            self.counters.released += 1
        else:
            return False
        return True

    # New memory

    def wear_out(self) -> None:
        """All memory is worn."""
        for slot in self._slots:
            slot.is_worn = True
        for index in self._free.clear():
            self._slots[index].state = SlotState.ABANDONED

    def make_way(self, session: bytes) -> bool:
        """Have a free slot's memory replaced when other jobs may map all that is free; False when that is no help."""
        owner = self._sessions.get(session)
        if owner is None or len(owner.slots) >= self._limits.slots_per_session or self._free.has(owner.job):
            return False
        if not self._free or self.to_renew() is not None:
            return False
        self._slots[self._free.take_any()].state = SlotState.ABANDONED
        return True

    def to_renew(self) -> int | None:
        """An ABANDONED slot that may get new memory; None when there is none or too many orphans."""
        return next((index for index in range(len(self._slots)) if self._may_renew(index)), None)

    def renew(self, index: int) -> bool:
        """The slot has new memory, and its old, if somebody may read it, is an orphan; False when no longer wanted."""
        if not self._may_renew(index):
            return False
        slot = self._slots[index]
        if slot.handle is not None:
            self._orphans[index, slot.epoch] = _Orphan(holder=slot.holder, token=slot.handle.token)
        self._slots[index] = _Slot(epoch=slot.epoch + 1)
        self._forget(slot.job)
        self._put_back(index)
        self.counters.renewed += 1
        return True

    # Looking

    @property
    def num_orphans(self) -> int:
        """Replaced memories that a holder may still read."""
        return len(self._orphans)

    def slots_by_state(self) -> dict[SlotState, int]:
        """How many slots are in each state; together all of them."""
        count = Counter(slot.state for slot in self._slots)
        return {state: count[state] for state in SlotState}

    @property
    def slots_of(self) -> Mapping[str, int]:
        """Slots with what each job asked for, also those that a client of it maps whose session has ended."""
        return self._slots_of

    def sessions(self) -> tuple[SessionState, ...]:
        """Every open session, in order of opening."""
        now = self._clock()
        return tuple(
            SessionState(job=s.job, slots=len(s.slots), silent_s=now - s.heard_at) for s in self._sessions.values()
        )

    def _session(self, session: bytes) -> _Session:
        found = self._sessions.get(session)
        if found is None:
            raise HandleGone("the session is unknown or its lease has ended; open a new one")
        return found

    def _hold(self, slot: _Slot, handle: Handle, holder: int) -> None:
        slot.state, slot.holder, slot.mapped_by = SlotState.HELD, holder, slot.job
        self.counters.claimed += 1
        self.counters.claimed_bytes += handle.size_bytes

    def _is_answer(self, session: bytes, key: Key) -> bool:
        if not 0 <= key.segment < len(self._slots):
            return False
        slot = self._slots[key.segment]
        return (
            slot.handle is not None
            and slot.epoch == key.epoch
            and slot.session == session
            and hmac.compare_digest(slot.handle.token, key.token)
        )

    def _end_handle(self, index: int) -> None:
        slot = self._slots[index]
        if slot.readers:  # streams still read, on the session's account: the last one comes here again
            slot.state, slot.handle, slot.holder = SlotState.HELD, None, None
            return
        if owner := self._sessions.get(slot.session):
            owner.slots.discard(index)
        self._slots[index] = _Slot(epoch=slot.epoch, is_worn=slot.is_worn, mapped_by=slot.mapped_by)
        self._forget(slot.job)
        self._put_back(index)

    def _forget(self, job: str | None) -> None:
        if job is not None:
            self._slots_of[job] -= 1
            if not self._slots_of[job]:
                del self._slots_of[job]

    def _put_back(self, index: int) -> None:
        if self._slots[index].is_worn:
            self._slots[index].state = SlotState.ABANDONED
            return
        self._free.put(index, self._slots[index].mapped_by)
        self._on_free()

    def _may_renew(self, index: int) -> bool:
        slot = self._slots[index]
        is_read = slot.handle is not None
        return slot.state is SlotState.ABANDONED and not (is_read and self.num_orphans >= self._limits.max_abandoned)
