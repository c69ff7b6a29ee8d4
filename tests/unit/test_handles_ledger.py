"""The ledger gives a slot to one hand at a time, and always takes it back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from kdmesh.errors import ConfigError, HandleGone
from kdmesh.handles.slab.ledger import Ledger
from kdmesh.handles.slab.limits import SlabLimits
from kdmesh.handles.slab.reports import SlotState
from kdmesh.types import DType, Handle


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Books:
    """A ledger, its clock, and how often it said that a slot came free."""

    ledger: Ledger
    clock: Clock
    freed: list[None]

    def answer(self, session: bytes) -> Handle:
        """A published handle."""
        slot = self.ledger.acquire(session)
        assert slot is not None
        return self.ledger.publish(slot, rows=2, cols=3, dtype=DType.FLOAT32)

    def states(self) -> dict[str, int]:
        """Slots by state, those with none left out."""
        return {state.value: n for state, n in self.ledger.slots_by_state().items() if n}


def books(slots: int = 2, per_session: int = 2, max_abandoned: int = 1) -> Books:
    limits = SlabLimits(
        slots=slots, slot_bytes=1, slots_per_session=per_session, lease_s=30, claim_s=10, max_abandoned=max_abandoned
    )
    clock, freed = Clock(), list[None]()
    return Books(Ledger(limits, clock, lambda: freed.append(None)), clock, freed)


def test_slot_goes_round() -> None:
    b = books()
    session = b.ledger.open_session("job")
    slot = b.ledger.acquire(session)
    assert slot is not None
    assert b.states() == {"free": 1, "filling": 1}
    handle = b.ledger.publish(slot, rows=2, cols=3, dtype=DType.BFLOAT16)
    assert (handle.segment, handle.epoch, handle.offset_bytes, handle.size_bytes) == (slot, 1, 0, 12)
    assert b.states() == {"free": 1, "ready": 1}
    b.ledger.claim(session, handle, holder=1)
    assert b.states() == {"free": 1, "held": 1}
    assert not b.freed
    b.ledger.release(session, handle)
    assert b.states() == {"free": 2}
    assert len(b.freed) == 1


def test_answer_to_who_has_the_slot_mapped_is_held_at_once() -> None:
    b = books()
    session = b.ledger.open_session("job")
    slot = b.ledger.acquire(session)
    assert slot is not None
    handle = b.ledger.publish(slot, rows=2, cols=3, dtype=DType.FLOAT32, holder=7)
    assert handle.is_claimed
    assert b.states() == {"free": 1, "held": 1}
    assert (b.ledger.counters.claimed, b.ledger.counters.claimed_bytes) == (1, 24)
    b.clock.now += 11  # past claim_s: nothing is left to claim
    b.ledger.sweep()
    assert b.states() == {"free": 1, "held": 1}
    with pytest.raises(HandleGone, match="claimed before"):
        b.ledger.claim(session, handle, holder=8)
    b.ledger.end_session(session)
    assert b.states() == {"free": 1, "abandoned": 1}  # its memory is not written while the holder may read it
    b.ledger.holder_gone(7)
    assert b.states() == {"free": 2}


def test_session_gets_no_more_than_its_share() -> None:
    b = books(slots=3, per_session=2)
    greedy, other = b.ledger.open_session("a"), b.ledger.open_session("b")
    first = b.answer(greedy)
    assert b.ledger.acquire(greedy) is not None
    assert b.ledger.acquire(greedy) is None
    assert b.ledger.acquire(other) is not None
    assert b.ledger.acquire(other) is None  # no credit left
    b.ledger.release(greedy, first)
    assert b.ledger.acquire(greedy) is not None


def test_stream_that_still_reads_counts_against_the_share() -> None:
    b = books(slots=2, per_session=1)
    session = b.ledger.open_session("job")
    handle = b.answer(session)
    b.ledger.begin_read(handle)
    b.ledger.release(session, handle)
    assert b.ledger.acquire(session) is None
    b.ledger.end_read(handle)
    assert b.ledger.acquire(session) is not None


def test_only_the_very_handle_of_the_session_opens_a_slot() -> None:
    b = books()
    session, other = b.ledger.open_session("a"), b.ledger.open_session("b")
    handle = b.answer(session)
    wrong = [
        (session, replace(handle, token=bytes(16))),
        (session, replace(handle, token=b"")),
        (session, replace(handle, epoch=2)),
        (session, replace(handle, segment=1 - handle.segment)),
        (session, replace(handle, segment=99)),
        (session, replace(handle, segment=-1)),
        (other, handle),
        (bytes(16), handle),
    ]
    for who, what in wrong:
        with pytest.raises(HandleGone):
            b.ledger.claim(who, what, holder=1)
        with pytest.raises(HandleGone):
            b.ledger.find(who, what)
        b.ledger.release(who, what)
    assert b.states() == {"free": 1, "ready": 1}
    assert b.ledger.find(session, handle) == handle


def test_handle_is_mapped_once_and_streamed_often() -> None:
    b = books()
    session = b.ledger.open_session("job")
    handle = b.answer(session)
    b.ledger.claim(session, handle, holder=1)
    with pytest.raises(HandleGone, match="claimed before"):
        b.ledger.claim(session, handle, holder=1)
    for _ in range(2):
        b.ledger.begin_read(b.ledger.find(session, handle))
    assert b.ledger.counters.streamed == 2


def test_released_handle_is_gone_for_good() -> None:
    b = books(slots=1)
    session = b.ledger.open_session("job")
    old = b.answer(session)
    b.ledger.release(session, old)
    b.ledger.release(session, old)
    new = b.answer(session)
    with pytest.raises(HandleGone):
        b.ledger.claim(session, old, holder=1)
    b.ledger.release(session, old)
    b.ledger.claim(session, new, holder=1)


def test_answer_that_nobody_claims_ends() -> None:
    b = books()
    session = b.ledger.open_session("job")
    unclaimed, claimed = b.answer(session), b.answer(session)
    b.ledger.claim(session, claimed, holder=1)
    b.clock.now += 10
    b.ledger.sweep()
    assert b.states() == {"ready": 1, "held": 1}
    b.clock.now += 0.1
    b.ledger.sweep()
    assert b.states() == {"free": 1, "held": 1}
    with pytest.raises(HandleGone):
        b.ledger.claim(session, unclaimed, holder=1)
    assert b.ledger.counters.unclaimed == 1


def test_session_lives_as_long_as_it_is_heard() -> None:
    b = books()
    session = b.ledger.open_session("job")
    for _ in range(5):
        b.clock.now += 29
        b.ledger.keep_alive(session)
        assert b.ledger.sweep() == []
    b.clock.now += 30.1
    (end,) = b.ledger.sweep()
    assert (end.token, end.job, end.abandoned) == (session, "job", 0)
    for call in (b.ledger.keep_alive, b.ledger.acquire):
        with pytest.raises(HandleGone):
            call(session)
    assert b.ledger.sweep() == []
    assert b.ledger.end_session(session) is None


def test_server_that_stood_still_does_not_blame_the_clients() -> None:
    b = books()
    session = b.ledger.open_session("job")
    b.answer(session)
    b.clock.now += 100
    b.ledger.excuse(95)
    assert b.ledger.sweep() == []
    assert b.states() == {"free": 1, "ready": 1}


def test_silent_session_gives_back_what_it_never_mapped() -> None:
    b = books(slots=3, per_session=3)
    session = b.ledger.open_session("job")
    b.answer(session)
    streamed = b.answer(session)
    b.ledger.begin_read(streamed)
    b.ledger.end_read(streamed)
    assert b.states() == {"free": 1, "ready": 1, "held": 1}
    b.ledger.end_session(session)
    assert b.states() == {"free": 3}


def test_stream_keeps_its_slot_when_the_session_ends() -> None:
    b = books(slots=1)
    session, other = b.ledger.open_session("a"), b.ledger.open_session("b")
    handle = b.answer(session)
    b.ledger.begin_read(handle)
    b.ledger.begin_read(handle)
    b.ledger.end_session(session)
    b.ledger.end_read(handle)
    assert b.ledger.acquire(other) is None
    b.ledger.end_read(handle)
    assert b.ledger.acquire(other) is not None


@pytest.mark.parametrize("finish", ["publish", "cancel"])
def test_slot_being_filled_is_free_only_when_the_engine_is_done(finish: str) -> None:
    b = books(slots=1)
    session, other = b.ledger.open_session("a"), b.ledger.open_session("b")
    slot = b.ledger.acquire(session)
    assert slot is not None
    b.ledger.end_session(session)
    assert b.states() == {"filling": 1}
    assert b.ledger.acquire(other) is None
    if finish == "cancel":
        b.ledger.cancel(slot)
    else:
        with pytest.raises(HandleGone):
            b.ledger.publish(slot, rows=1, cols=1, dtype=DType.FLOAT32)
    assert b.ledger.acquire(other) == slot


def test_dead_process_gives_everything_back_at_once() -> None:
    b = books(slots=3, per_session=3)
    session = b.ledger.open_session("job")
    b.answer(session)
    b.ledger.claim(session, b.answer(session), holder=7)
    filling = b.ledger.acquire(session)
    assert filling is not None
    end = b.ledger.process_died(7, session)
    assert end is not None and end.abandoned == 0
    assert b.states() == {"free": 2, "filling": 1}
    assert b.ledger.process_died(7, session) is None
    assert b.ledger.counters.sessions_died == 1


def test_holder_that_hangs_up_gives_back_what_it_mapped_and_the_session_goes_on() -> None:
    b = books()
    session = b.ledger.open_session("job")
    mapped, ready = b.answer(session), b.answer(session)
    b.ledger.claim(session, mapped, holder=1)
    b.ledger.holder_gone(1)
    assert b.states() == {"free": 1, "ready": 1}
    b.ledger.claim(session, ready, holder=2)


def test_silent_holder_keeps_its_memory_and_the_slot_gets_other() -> None:
    b = books(slots=1)
    session, other = b.ledger.open_session("a"), b.ledger.open_session("b")
    handle = b.answer(session)
    b.ledger.claim(session, handle, holder=1)
    end = b.ledger.end_session(session)
    assert end is not None and end.abandoned == 1
    assert b.states() == {"abandoned": 1}
    assert b.ledger.acquire(other) is None
    assert b.ledger.to_renew() == 0
    assert b.ledger.renew(0)
    assert (b.states(), b.ledger.num_orphans, len(b.freed)) == ({"free": 1}, 1, 1)
    new = b.answer(other)
    assert new.epoch == 2
    with pytest.raises(HandleGone):
        b.ledger.claim(session, handle, holder=1)
    b.ledger.holder_gone(1)
    assert (b.states(), b.ledger.num_orphans) == ({"ready": 1}, 0)


def test_no_more_than_max_abandoned_memories_are_replaced() -> None:
    b = books(slots=2, max_abandoned=1)
    session = b.ledger.open_session("a")
    b.ledger.claim(session, b.answer(session), holder=1)
    b.ledger.claim(session, b.answer(session), holder=2)
    b.ledger.end_session(session)
    first = b.ledger.to_renew()
    assert first is not None and b.ledger.renew(first)
    assert b.ledger.to_renew() is None
    assert not b.ledger.renew(1 - first)
    assert b.states() == {"free": 1, "abandoned": 1}
    b.ledger.holder_gone(1)
    b.ledger.holder_gone(2)
    assert (b.states(), b.ledger.num_orphans) == ({"free": 2}, 0)


def test_holder_that_wakes_and_lets_go_is_no_longer_waited_for() -> None:
    b = books(slots=2)
    session = b.ledger.open_session("a")
    handles = [b.answer(session), b.answer(session)]
    for handle in handles:
        b.ledger.claim(session, handle, holder=1)
    b.ledger.end_session(session)
    assert b.ledger.renew(handles[0].segment)
    for handle in handles:
        b.ledger.release(session, replace(handle, token=bytes(16)))
    assert (b.states(), b.ledger.num_orphans) == ({"free": 1, "abandoned": 1}, 1)
    for handle in handles:
        b.ledger.release(session, handle)
    assert (b.states(), b.ledger.num_orphans) == ({"free": 2}, 0)


def test_worn_memory_that_nobody_reads_is_replaced_whatever_holders_still_have() -> None:
    b = books(slots=2, max_abandoned=1)
    session = b.ledger.open_session("a")
    b.ledger.claim(session, b.answer(session), holder=1)
    b.ledger.end_session(session)
    replaced = b.ledger.to_renew()
    assert replaced is not None and b.ledger.renew(replaced)
    b.ledger.wear_out()
    while (worn := b.ledger.to_renew()) is not None:
        assert b.ledger.renew(worn)
    assert (b.states(), b.ledger.num_orphans) == ({"free": 2}, 1)


def test_memory_that_comes_too_late_is_not_wanted() -> None:
    b = books(slots=1)
    session = b.ledger.open_session("a")
    b.ledger.claim(session, b.answer(session), holder=1)
    b.ledger.end_session(session)
    assert b.ledger.to_renew() == 0
    b.ledger.holder_gone(1)
    assert not b.ledger.renew(0)
    assert (b.states(), b.ledger.num_orphans) == ({"free": 1}, 0)


def test_stream_of_a_replaced_memory_does_not_touch_the_new_one() -> None:
    b = books(slots=1)
    session, other = b.ledger.open_session("a"), b.ledger.open_session("b")
    old = b.answer(session)
    b.ledger.claim(session, old, holder=1)
    b.ledger.begin_read(old)
    b.ledger.end_session(session)
    assert b.ledger.renew(0)
    new = b.answer(other)
    b.ledger.begin_read(new)
    b.ledger.end_read(old)
    b.ledger.release(other, new)
    assert b.states() == {"held": 1}
    b.ledger.end_read(new)
    assert b.states() == {"free": 1}


def test_stream_outlives_the_holder_of_an_abandoned_slot() -> None:
    b = books(slots=1)
    session = b.ledger.open_session("a")
    handle = b.answer(session)
    b.ledger.claim(session, handle, holder=1)
    b.ledger.begin_read(handle)
    b.ledger.end_session(session)
    b.ledger.holder_gone(1)
    assert b.states() == {"held": 1}
    b.ledger.end_read(handle)
    assert b.states() == {"free": 1}


def test_memory_that_other_jobs_map_makes_way_only_for_a_session_that_can_use_it() -> None:
    b = books(slots=3, per_session=1)
    first, second, full = (b.ledger.open_session(job) for job in ("a", "b", "c"))
    b.answer(full)
    for session in (first, second):
        handle = b.answer(session)
        b.ledger.claim(session, handle, holder=1)
    for session in (first, second):
        b.ledger.end_session(session)
    b.ledger.holder_gone(1)
    assert not b.ledger.make_way(full)  # it has its share
    assert not b.ledger.make_way(first)  # it has ended
    assert not b.ledger.make_way(b.ledger.open_session("a"))  # a slot of its own job is free
    assert b.states() == {"free": 2, "ready": 1}
    other = b.ledger.open_session("d")
    assert b.ledger.make_way(other)
    assert not b.ledger.make_way(other)  # it has been done
    assert b.states() == {"free": 1, "ready": 1, "abandoned": 1}


def test_looking_shows_every_state_and_session() -> None:
    b = books()
    first = b.ledger.open_session("a")
    b.clock.now += 2
    b.ledger.open_session("b")
    b.answer(first)
    assert set(b.ledger.slots_by_state()) == set(SlotState)
    assert [(s.job, s.slots, s.silent_s) for s in b.ledger.sessions()] == [("a", 1, 2.0), ("b", 0, 0.0)]


@pytest.mark.parametrize(
    "change", [{"slots": 0}, {"slot_bytes": -1}, {"slots_per_session": 0}, {"lease_s": 0}, {"max_abandoned": -1}]
)
def test_impossible_limit_is_refused_by_name(change: dict[str, int]) -> None:
    good = SlabLimits(slots=1, slot_bytes=1, slots_per_session=1, lease_s=1, claim_s=1, max_abandoned=0)
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(good, **change)  # type: ignore[arg-type]
