"""The store keeps the ledger's promises with real memory, real time and a real loop."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmesh.errors import ConfigError, HandleGone, InvalidRequest
from kdmesh.handles.doors.shm import ShmDoor
from kdmesh.handles.slab import renewal
from kdmesh.handles.slab.limits import SlabLimits
from kdmesh.handles.slab.memory import Segment, create_segment_in_thread
from kdmesh.handles.slab.shared import Matrix
from kdmesh.handles.slab.store import SlabStore
from kdmesh.types import DType
from tests.support.descriptors import nothing_left_open
from tests.support.handles_consumer import digest, until
from tests.support.handles_slab import SLOT_BYTES, answer, slab, states


async def test_stream_reads_what_was_written(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        session = store.open_session("job")
        handle, expected = answer(store, session, seed=1)
        for _ in range(2):
            with store.reading(session, handle) as view:
                assert (digest(view), view.readonly) == (expected, True)
        assert states(store) == {"free": 1, "held": 1}
        store.release(session, handle)
        with pytest.raises(HandleGone), store.reading(session, handle):
            pass


async def test_handle_that_says_something_else_is_refused(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        session = store.open_session("job")
        handle, _ = answer(store, session, seed=1)
        (shared,) = await store.add_shared_segment(
            [Matrix(data=memoryview(bytes(64)), rows=4, cols=4, dtype=DType.FLOAT32)]
        )
        for good in (handle, shared):
            for change in ({"rows": 3}, {"cols": 999}, {"dtype": DType.FLOAT16}, {"offset_bytes": 64}):
                with (
                    pytest.raises(InvalidRequest, match="answered was"),
                    store.reading(session, replace(good, **change)),
                ):
                    pass
            for change in ({"token": bytes(16)}, {"epoch": 2}, {"segment": 77}):
                with pytest.raises(HandleGone), store.reading(session, replace(good, **change)):
                    pass
        store.close_session(session)
        for good in (handle, shared):
            with pytest.raises(HandleGone), store.reading(session, good):
                pass


def shared(value: float) -> list[Matrix]:
    return [Matrix(data=memoryview(np.full((4, 4), value, np.float32)), rows=4, cols=4, dtype=DType.FLOAT32)] * 2


async def test_a_retired_segment_stays_for_those_who_were_lent_it_and_goes_with_the_last(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        one, other, stranger = (store.open_session("job") for _ in range(3))
        handles = await store.add_shared_segment(shared(1))
        store.lend(one, handles)
        store.lend(other, handles)
        store.retire_shared_segment(handles)
        store.release(one, handles[0])  # one of the two matrices
        store.close_session(stranger)
        store.close_session(other)
        with store.reading(one, handles[1]) as view:
            store.release(one, handles[1])
            assert np.frombuffer(view, np.float32).tolist() == [1.0] * 16
            assert store.snapshot().shared_bytes > 0
        assert store.snapshot().shared_bytes == 0
        with pytest.raises(HandleGone), store.reading(one, handles[1]):
            pass


async def test_a_session_holds_one_shared_segment_and_no_number_is_used_twice(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        session = store.open_session("job")
        numbers, sizes = [], set()
        for value in range(4):
            handles = await store.add_shared_segment(shared(value))
            store.lend(session, handles)
            numbers.append(handles[0].segment)
            store.retire_shared_segment(handles)
            sizes.add(store.snapshot().shared_bytes)
        assert numbers == list(range(numbers[0], numbers[0] + 4))
        assert len(sizes) == 1
        unwanted = await store.add_shared_segment(shared(9))
        store.retire_shared_segment(unwanted)  # nobody was told of it
        assert {store.snapshot().shared_bytes} == sizes


async def test_slot_is_not_written_while_a_stream_reads_it(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=1, lease_s=0.1) as store:
        session = store.open_session("job")
        handle, expected = answer(store, session, seed=1)
        with store.reading(session, handle) as view:
            await until(lambda: not store.is_open(session))  # it was silent
            other = store.open_session("other")
            assert store.try_acquire(other) is None
            assert digest(view) == expected
        assert store.try_acquire(other) is not None


async def test_waiting_scheduler_is_told_once_of_slots_that_come_free_together(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=2) as store:
        calls = list[str]()
        store.on_free = lambda: calls.append("free")
        store.on_session_end = lambda end: calls.append("end" if end.token == first else "other")
        first = store.open_session("job")
        answer(store, first, seed=1)
        answer(store, first, seed=2)
        store.close_session(first)
        store.close_session(first)
        assert calls == []  # never inside a call
        await asyncio.sleep(0)
        assert calls == ["free", "end"]


async def test_unclaimed_answer_ends_in_time(tmp_path: Path) -> None:
    async with slab(tmp_path, claim_s=0.1) as store:
        session = store.open_session("job")
        handle, _ = answer(store, session, seed=1)
        assert 0.1 < await until(lambda: states(store) == {"free": 2}) < 1
        with pytest.raises(HandleGone), store.reading(session, handle):
            pass
        assert store.is_open(session)


async def test_session_lives_while_it_is_kept_alive(tmp_path: Path) -> None:
    async with slab(tmp_path, lease_s=0.2) as store:
        session = store.open_session("job")
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.5
        while loop.time() < end:
            store.keep_alive(session)
            await asyncio.sleep(0.01)
        assert 0.1 < await until(lambda: not store.is_open(session)) < 1
        with pytest.raises(HandleGone):
            store.keep_alive(session)
        with pytest.raises(HandleGone):
            store.try_acquire(session)


async def test_loop_that_stood_still_does_not_end_sessions(tmp_path: Path) -> None:
    async with slab(tmp_path, lease_s=0.5) as store:
        session = store.open_session("job")
        await asyncio.sleep(0)  # the sweep has begun to wait
        time.sleep(0.8)  # noqa: ASYNC251  nobody could be heard
        await asyncio.sleep(0.1)
        assert store.is_open(session)


async def test_answer_to_a_session_that_ended_is_taken_back(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=1) as store:
        session = store.open_session("job")
        lease = store.try_acquire(session)
        assert lease is not None
        store.close_session(session)
        assert states(store) == {"filling": 1}
        with pytest.raises(HandleGone):
            store.publish(lease, rows=1, cols=1, dtype=DType.FLOAT32)
        assert states(store) == {"free": 1}
        store.cancel(lease)  # as a `finally` does
        assert states(store) == {"free": 1}


async def test_lease_that_has_ended_writes_no_more(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=2) as store:
        session = store.open_session("job")
        published, cancelled = store.try_acquire(session), store.try_acquire(session)
        assert published is not None and cancelled is not None
        store.publish(published, rows=1, cols=1, dtype=DType.FLOAT32)
        store.cancel(cancelled)
        for lease in (published, cancelled):
            with pytest.raises(ValueError, match="released"):
                lease.buffer[0] = 1


class OtherProcess:
    """Another process that writes slots, as far as the store can tell."""

    def __init__(self) -> None:
        self.segments: dict[int, memoryview] = {}

    def adopt(self, segment: Segment) -> None:
        self.segments[segment.number] = segment.writable[:]

    def drop(self, segment: Segment) -> None:
        self.segments.pop(segment.number).release()


async def test_another_process_is_shown_every_memory_that_it_may_have_to_write(tmp_path: Path) -> None:
    other = OtherProcess()
    async with slab(tmp_path, slots=2, writer=other) as store:
        assert len(other.segments) == 2
        session = store.open_session("job")
        lease = store.try_acquire(session)
        assert lease is not None
        replaced = lease.segment
        other.segments[replaced][:4] = np.float32(7).tobytes()
        handle = store.publish(lease, rows=1, cols=1, dtype=DType.FLOAT32)
        door = await ShmDoor.connect(store.socket_path, session, store.nonce)
        tensor = await door.fetch(handle)
        assert tensor.item() == 7
        store.close_session(session)
        await until(lambda: states(store) == {"free": 2})
        assert replaced not in other.segments
        assert len(other.segments) == 2
        door.close()


async def test_after_a_change_of_writer_no_slot_is_lent_with_the_old_memory_and_what_is_read_stays(
    tmp_path: Path,
) -> None:
    async with slab(tmp_path, slots=3) as store:
        session = store.open_session("job")
        door = await ShmDoor.connect(store.socket_path, session, store.nonce)
        held, expected = answer(store, session, seed=1)
        tensor = await door.fetch(held)
        unread, unread_expected = answer(store, session, seed=2)
        filling = store.try_acquire(session)
        assert filling is not None
        old = {segment.number for segment in store.slots}
        await store.replace_memory()
        assert states(store) == {"held": 1, "ready": 1, "filling": 1}
        late = await door.fetch(unread)
        assert digest(late.view(torch.uint8).numpy().data) == unread_expected
        assert digest(tensor.view(torch.uint8).numpy().data) == expected
        store.cancel(filling)
        del tensor, late
        gc.collect()
        await until(lambda: states(store) == {"free": 3})
        leases = [store.try_acquire(session) for _ in range(3)]
        assert not old & {lease.segment for lease in leases if lease is not None}
        assert store.snapshot().orphans == 0
        door.close()


async def test_slot_without_new_memory_stays_out_of_service_until_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = list[int]()

    async def scarce(size_bytes: int, writer: None) -> Segment:
        tries.append(size_bytes)
        if len(tries) < 3:
            raise OSError("no memory")
        return await create_segment_in_thread(size_bytes)

    async with slab(tmp_path, slots=1, lease_s=0.2) as store:
        session = store.open_session("job")
        door = await ShmDoor.connect(store.socket_path, session, store.nonce)
        handle, expected = answer(store, session, seed=1)
        tensor = await door.fetch(handle)
        monkeypatch.setattr(renewal, "create_segment_in_thread", scarce)
        store.close_session(session)
        await until(lambda: len(tries) == 1)
        assert states(store) == {"abandoned": 1}
        await until(lambda: states(store) == {"free": 1})
        assert len(tries) == 3
        assert digest(tensor.view(torch.uint8).numpy().data) == expected
        door.close()


async def test_memory_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    limits = SlabLimits(slots=4, slot_bytes=1 << 40, slots_per_session=1, lease_s=1, claim_s=1, max_abandoned=0)
    with pytest.raises(ConfigError, match="are available"):
        async with SlabStore(limits, socket_path=tmp_path / "broker.sock"):
            pass
    assert not (tmp_path / "broker.sock").exists()


async def test_everything_goes_with_the_store(tmp_path: Path) -> None:
    def mapped() -> int:
        gc.collect()  # what failed tests left in cycles
        return Path("/proc/self/maps").read_text().count("memfd:kdmesh")

    before = mapped()
    with nothing_left_open():
        async with slab(tmp_path, slots=3) as store:
            session = store.open_session("job")
            door = await ShmDoor.connect(store.socket_path, session, store.nonce)
            handle, _ = answer(store, session, seed=1)
            await store.add_shared_segment([Matrix(data=memoryview(bytes(64)), rows=4, cols=4, dtype=DType.FLOAT32)])
            tensor = await door.fetch(handle)
            assert mapped() - before == 5  # three slots, a shared segment, the door's view of one slot
            assert store.snapshot().shared_bytes + 3 * store.slot_bytes >= 3 * SLOT_BYTES + 64
        assert tensor.shape == (64, SLOT_BYTES // 128)
        del tensor
        door.close()
    assert mapped() == before


async def test_error_inside_the_store_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(HandleGone, match="mine"):
        async with slab(tmp_path):
            raise HandleGone("mine")
