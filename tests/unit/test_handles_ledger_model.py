"""Whatever happens in whatever order, no memory is ever in two hands, and the credits add up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kdmesh.errors import HandleGone
from kdmesh.handles.slab.ledger import Ledger
from kdmesh.handles.slab.limits import SlabLimits
from kdmesh.handles.slab.reports import SlotState
from kdmesh.types import DType, Handle

LIMITS = SlabLimits(slots=3, slot_bytes=1, slots_per_session=2, lease_s=10, claim_s=4, max_abandoned=1)
HOLDERS = (1, 2)
PICK = st.integers(min_value=0, max_value=7)


@dataclass
class Memory:
    """One memory of a slot, and who can touch it in truth."""

    writers: int = 0
    streams: int = 0
    mappers: set[tuple[int, bytes]] = field(default_factory=set)  # (holder, token) that reads
    seen_by: set[str] = field(default_factory=set)  # jobs that mapped it once, and may do so for ever

    @property
    def is_touched(self) -> bool:
        return bool(self.writers or self.streams or self.mappers)


class Slab(RuleBasedStateMachine):
    """Plays engines, holders and streams against the ledger, and knows who really touches what."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.frees = 0
        self.ledger = Ledger(LIMITS, lambda: self.now, self.freed)
        self.memories: dict[tuple[int, int], Memory] = {}
        self.epochs = [1] * LIMITS.slots
        self.worn = [0] * LIMITS.slots  # newest epoch that nobody can write any more
        self.num_worn_free = 0
        self.sessions = [self.ledger.open_session("a"), self.ledger.open_session("b")]
        self.fills: list[tuple[int, bytes]] = []
        self.answers: list[tuple[Handle, bytes]] = []  # dead ones too
        self.streams: list[Handle] = []

    def freed(self) -> None:
        self.frees += 1

    def memory(self, handle: Handle) -> Memory:
        return self.memories[handle.segment, handle.epoch]

    def answer(self, pick: int) -> tuple[Handle, bytes]:
        """One of the newest answers; the older one is, the likelier it is dead."""
        return self.answers[-1 - pick % min(len(self.answers), 4)]

    @rule(pick=PICK)
    def acquire(self, pick: int) -> None:
        session = self.sessions[pick % 2]
        slot = self.ledger.acquire(session)
        if slot is not None:
            memory = self.memories.setdefault((slot, self.epochs[slot]), Memory())
            assert not memory.is_touched
            assert self.epochs[slot] > self.worn[slot]
            assert memory.seen_by <= {self.ledger.job(session)}
            memory.writers = 1
            self.fills.append((slot, session))

    @precondition(lambda self: self.fills)
    @rule(
        pick=PICK,
        is_cancelled=st.sampled_from([False, False, False, True]),
        holder=st.none() | st.sampled_from(HOLDERS),
    )
    def finish(self, pick: int, is_cancelled: bool, holder: int | None) -> None:
        slot, session = self.fills.pop(pick % len(self.fills))
        self.memories[slot, self.epochs[slot]].writers = 0
        if is_cancelled:
            self.ledger.cancel(slot)
            return
        try:
            handle = self.ledger.publish(slot, rows=1, cols=1, dtype=DType.FLOAT32, holder=holder)
        except HandleGone:
            assert session not in self.sessions
            return
        self.answers.append((handle, session))
        if holder is not None:
            self.memory(handle).mappers.add((holder, handle.token))
            self.memory(handle).seen_by.add(self.ledger.job(session))

    @precondition(lambda self: self.answers)
    @rule(pick=PICK, holder=st.sampled_from(HOLDERS))
    def claim(self, pick: int, holder: int) -> None:
        handle, session = self.answer(pick)
        try:
            self.ledger.claim(session, handle, holder)
        except HandleGone:
            return
        assert handle.epoch == self.epochs[handle.segment]
        assert not self.memory(handle).mappers and not self.memory(handle).writers
        self.memory(handle).mappers.add((holder, handle.token))
        self.memory(handle).seen_by.add(self.ledger.job(session))

    @rule(pick=PICK, holder=st.sampled_from(HOLDERS))
    def hold(self, pick: int, holder: int) -> None:
        """The usual way, in one step, so that the unusual happens more often."""
        self.acquire(pick)
        if self.fills:
            self.finish(len(self.fills) - 1, is_cancelled=False, holder=None)
        if self.answers:
            self.claim(0, holder)

    @precondition(lambda self: self.answers)
    @rule(pick=PICK)
    def begin_read(self, pick: int) -> None:
        handle, session = self.answer(pick)
        try:
            assert self.ledger.find(session, handle) == handle
        except HandleGone:
            return
        self.ledger.begin_read(handle)
        assert not self.memory(handle).writers
        self.memory(handle).streams += 1
        self.streams.append(handle)

    @precondition(lambda self: self.streams)
    @rule(pick=PICK)
    def end_read(self, pick: int) -> None:
        handle = self.streams.pop(pick % len(self.streams))
        self.memory(handle).streams -= 1
        self.ledger.end_read(handle)

    @precondition(lambda self: self.answers)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        handle, session = self.answer(pick)
        memory = self.memory(handle)
        memory.mappers = {m for m in memory.mappers if m[1] != handle.token}
        self.ledger.release(session, handle)

    @precondition(lambda self: self.answers)
    @rule(pick=PICK)
    def try_what_is_not_mine(self, pick: int) -> None:
        handle, session = self.answer(pick)
        other = next(s for s in self.sessions if s != session)
        for who, what in ((other, handle), (session, replace(handle, token=bytes(16)))):
            self.ledger.release(who, what)
            try:
                self.ledger.claim(who, what, holder=1)
            except HandleGone:
                continue
            raise AssertionError("claimed with a wrong handle")

    @rule(holder=st.sampled_from(HOLDERS), pick=PICK, kind=st.sampled_from(["hang up", "die", "close", "close"]))
    def leave(self, holder: int, pick: int, kind: str) -> None:
        if kind != "close":
            for memory in self.memories.values():
                memory.mappers = {m for m in memory.mappers if m[0] != holder}
        session = self.sessions[pick % 2]
        match kind:
            case "hang up":
                self.ledger.holder_gone(holder)
            case "die":
                self.ledger.process_died(holder, session)
            case "close":
                self.ledger.end_session(session)
        self.open_again()

    @rule(pick=PICK, seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, pick: int, seconds: float) -> None:
        self.now += seconds
        self.ledger.keep_alive(self.sessions[pick % 2])
        self.ledger.sweep()
        self.open_again()

    def open_again(self) -> None:
        self.sessions = [s if self.ledger.is_open(s) else self.ledger.open_session("again") for s in self.sessions]

    @rule(slot=st.integers(-1, LIMITS.slots - 1))
    def renew(self, slot: int) -> None:
        wanted = self.ledger.to_renew()
        slot = slot if slot >= 0 or wanted is None else wanted
        if slot >= 0:
            is_renewed = self.ledger.renew(slot)
            assert is_renewed or slot != wanted
            self.epochs[slot] += is_renewed

    @rule(pick=PICK)
    def make_way(self, pick: int) -> None:
        session = self.sessions[pick % 2]
        if self.ledger.is_open(session) and self.ledger.make_way(session):
            self.num_worn_free += 1
            assert self.ledger.to_renew() is not None

    @precondition(lambda self: not self.fills)  # who wrote is gone
    @rule()
    def wear_out(self) -> None:
        self.num_worn_free += self.ledger.slots_by_state()[SlotState.FREE]
        self.worn = list(self.epochs)
        self.ledger.wear_out()

    @invariant()
    def credits_add_up(self) -> None:
        states = self.ledger.slots_by_state()
        assert sum(states.values()) == LIMITS.slots
        assert states[SlotState.FREE] == LIMITS.slots - self.ledger.counters.acquired - self.num_worn_free + self.frees
        assert states[SlotState.FILLING] == len(self.fills)
        assert self.ledger.num_orphans <= LIMITS.max_abandoned
        lent = LIMITS.slots - states[SlotState.FREE] - states[SlotState.ABANDONED]
        assert lent <= self.slots_of_jobs() <= LIMITS.slots - states[SlotState.FREE]
        assert all(session.slots <= LIMITS.slots_per_session for session in self.ledger.sessions())

    def slots_of_jobs(self) -> int:
        return sum(self.ledger.slots_of.values())

    def teardown(self) -> None:
        """When everybody has gone, every slot is back."""
        for slot, _ in self.fills:
            self.ledger.cancel(slot)
        for handle in self.streams:
            self.ledger.end_read(handle)
        for holder in HOLDERS:
            self.ledger.holder_gone(holder)
        self.now += 100
        self.ledger.sweep()
        assert self.ledger.num_orphans == 0
        while (worn := self.ledger.to_renew()) is not None:
            assert self.ledger.renew(worn)
        assert self.ledger.slots_by_state()[SlotState.FREE] == LIMITS.slots
        assert self.slots_of_jobs() == 0


Slab.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
test_no_memory_is_in_two_hands = Slab.TestCase
