"""Shared memory between real processes: what they read, how they let go, how they die."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from kdmesh.errors import HandleGone, Unavailable
from kdmesh.handles.slab import peers
from kdmesh.handles.slab.shared import Matrix
from kdmesh.handles.slab.store import SlabStore
from kdmesh.types import DType, Handle
from tests.support.handles_consumer import Consumer, Consumers, digest, running, until
from tests.support.handles_slab import SLOT_BYTES, answer, slab, states


@pytest.fixture(scope="module")
def consumers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consumers]:
    with running(tmp_path_factory.mktemp("consumers")) as made:
        yield made


@contextlib.asynccontextmanager
async def client(consumers: Consumers, store: SlabStore, job: str = "job") -> AsyncIterator[tuple[Consumer, bytes]]:
    """A consumer process with a session and an open door."""
    session = store.open_session(job)
    async with consumers.one() as consumer:
        await consumer.connect(store.socket_path, session, store.nonce)
        yield consumer, session


async def test_tensor_has_the_bytes_and_its_slot_comes_back_with_the_last_view(
    tmp_path: Path, consumers: Consumers
) -> None:
    async with slab(tmp_path) as store, client(consumers, store) as (consumer, session):
        handle, expected = answer(store, session, seed=1)
        assert await consumer.ask("fetch", handle=handle) == expected
        assert states(store) == {"free": 1, "held": 1}
        await consumer.ask("drop")
        assert await until(lambda: states(store) == {"free": 2}) < 1


async def test_segment_is_mapped_once_and_sent_once(tmp_path: Path, consumers: Consumers) -> None:
    async with slab(tmp_path, slots=1) as store, client(consumers, store) as (consumer, session):
        descriptors = await consumer.ask("descriptors")
        for seed in range(20):
            handle, expected = answer(store, session, seed)
            assert await consumer.ask("fetch", handle=handle) == expected
            await consumer.ask("drop")
            await until(lambda: states(store) == {"free": 1})
        assert await consumer.ask("mappings") == 1
        assert await consumer.ask("descriptors") == descriptors + 1  # Python's mmap keeps one


async def test_answer_in_memory_that_is_mapped_needs_no_claim(tmp_path: Path, consumers: Consumers) -> None:
    async with slab(tmp_path, slots=1) as store, client(consumers, store) as (consumer, session):
        first, expected = answer(store, session, seed=1)
        assert not first.is_claimed
        assert await consumer.ask("fetch", handle=first) == expected
        await consumer.ask("drop")
        await until(lambda: states(store) == {"free": 1})
        second, expected = answer(store, session, seed=2)
        assert second.is_claimed
        assert states(store) == {"held": 1}
        assert await consumer.ask("fetch", handle=second) == expected
        await consumer.ask("drop")
        assert await until(lambda: states(store) == {"free": 1}) < 1
        other = store.open_session("job")  # which has no door, and so nothing mapped
        foreign, _ = answer(store, other, seed=3)
        assert not foreign.is_claimed


async def test_consumer_killed_before_it_looks_gives_a_claimed_answer_back(
    tmp_path: Path, consumers: Consumers
) -> None:
    async with slab(tmp_path, slots=1) as store, client(consumers, store) as (consumer, session):
        handle, _ = answer(store, session, seed=1)
        await consumer.ask("fetch", handle=handle)
        await consumer.ask("drop")
        await until(lambda: states(store) == {"free": 1})
        answer(store, session, seed=2)
        assert states(store) == {"held": 1}
        consumer.signal(signal.SIGKILL)
        assert await until(lambda: states(store) == {"free": 1}) < 1


async def test_wrong_handles_are_gone_and_the_door_goes_on(tmp_path: Path, consumers: Consumers) -> None:
    async with slab(tmp_path) as store, client(consumers, store) as (consumer, session):
        other = store.open_session("other")
        foreign, _ = answer(store, other, seed=1)
        handle, expected = answer(store, session, seed=2)
        fields = {name: getattr(handle, name) for name in ("offset_bytes", "rows", "cols", "dtype")}
        forged = Handle(segment=handle.segment, epoch=1, token=bytes(16), **fields)
        stale = Handle(segment=handle.segment, epoch=7, token=handle.token, **fields)
        unknown = Handle(segment=1000, epoch=1, token=handle.token, **fields)
        for wrong in (foreign, forged, stale, unknown):
            with pytest.raises(HandleGone):
                await consumer.ask("fetch", handle=wrong)
        assert await consumer.ask("fetch", handle=handle) == expected
        await consumer.ask("drop")
        with pytest.raises(HandleGone):
            await consumer.ask("fetch", handle=handle)


@pytest.mark.parametrize("liveness", ["peer pidfd", "pid", "end of file"])
async def test_death_is_seen_on_old_kernels_too(
    tmp_path: Path, consumers: Consumers, liveness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if liveness != "peer pidfd":
        monkeypatch.setattr(peers, "_SO_PEERPIDFD", 9999)
    if liveness == "end of file":
        monkeypatch.setattr(os, "pidfd_open", _not_there)
    async with slab(tmp_path, slots=3) as store, client(consumers, store) as (consumer, session):
        child = await consumer.ask("fork_with_socket") if liveness != "end of file" else None
        handle, _ = answer(store, session, seed=1)
        await consumer.ask("fetch", handle=handle)
        answer(store, session, seed=2)
        consumer.signal(signal.SIGKILL)
        assert await until(lambda: states(store) == {"free": 3}) < 1
        assert not store.is_open(session)
        if child is not None:
            os.kill(child, signal.SIGKILL)


def _not_there(pid: int) -> int:
    raise OSError(errno.ENOSYS, "no such call")


@pytest.mark.parametrize("has_child", [False, True])
async def test_killed_consumer_gives_everything_back_at_once(
    tmp_path: Path, consumers: Consumers, has_child: bool
) -> None:
    async with (
        slab(tmp_path, slots=3) as store,
        client(consumers, store, "dies") as (dying, session),
        client(consumers, store, "lives") as (living, other),
    ):
        kept, expected = answer(store, other, seed=1)
        await living.ask("fetch", handle=kept)
        held, _ = answer(store, session, seed=2)
        await dying.ask("fetch", handle=held)
        answer(store, session, seed=3)  # never claimed
        assert states(store) == {"held": 2, "ready": 1}
        child = await dying.ask("fork_with_socket") if has_child else None
        ended = list[bytes]()
        store.on_session_end = lambda end: ended.append(end.token)
        dying.signal(signal.SIGKILL)
        took_s = await until(lambda: states(store) == {"free": 2, "held": 1})
        assert took_s < 1
        await until(lambda: ended == [session])
        assert await living.ask("look") == expected
        assert store.is_open(other)
        if child is not None:
            os.kill(child, signal.SIGKILL)


async def test_silent_consumer_keeps_right_bytes_and_its_credit_comes_back(
    tmp_path: Path, consumers: Consumers
) -> None:
    async with (
        slab(tmp_path, slots=1, lease_s=0.2) as store,
        client(consumers, store, "silent") as (silent, session),
    ):
        handle, expected = answer(store, session, seed=1)
        await silent.ask("fetch", handle=handle)
        silent.signal(signal.SIGSTOP)
        await until(lambda: states(store) == {"free": 1})
        assert store.snapshot().orphans == 1
        assert not store.is_open(session)

        other = store.open_session("other")
        for seed in range(2, 10):  # into the slot's new memory
            store.keep_alive(other)
            new, _ = answer(store, other, seed)
            assert new.epoch == 2
            store.release(other, new)
        silent.signal(signal.SIGCONT)
        assert await silent.ask("look") == expected
        with pytest.raises(HandleGone):
            await silent.ask("fetch", handle=handle, name="again")
        await silent.ask("drop")  # it lets go, and tells
        await until(lambda: store.snapshot().orphans == 0)
        assert await silent.ask("mappings") == 1  # ready for the next handle of that epoch, which never comes
        await silent.ask("close_door")
        assert await silent.ask("mappings") == 0


async def test_at_the_bound_a_slot_is_withheld_until_its_holder_dies(tmp_path: Path, consumers: Consumers) -> None:
    async with (
        slab(tmp_path, slots=2, lease_s=0.2, max_abandoned=1) as store,
        client(consumers, store, "silent") as (silent, session),
    ):
        for seed, name in ((1, "a"), (2, "b")):
            handle, _ = answer(store, session, seed)
            await silent.ask("fetch", handle=handle, name=name)
        silent.signal(signal.SIGSTOP)
        await until(lambda: states(store) == {"free": 1, "abandoned": 1})
        assert store.snapshot().orphans == 1
        silent.signal(signal.SIGKILL)
        await until(lambda: states(store) == {"free": 2} and store.snapshot().orphans == 0)
        counters = store.snapshot().counters
        assert (counters.abandoned, counters.renewed, counters.sessions_expired) == (2, 1, 1)


async def test_consumer_uses_the_new_memory_of_a_renewed_slot(tmp_path: Path, consumers: Consumers) -> None:
    async with (
        slab(tmp_path, slots=1) as store,
        client(consumers, store, "a") as (first, session),
        client(consumers, store, "a") as (second, other),
    ):
        old, _ = answer(store, other, seed=1)
        await second.ask("fetch", handle=old)  # has the first epoch mapped
        await second.ask("drop")
        await until(lambda: states(store) == {"free": 1})
        handle, expected = answer(store, session, seed=2)
        await first.ask("fetch", handle=handle)
        store.close_session(session)  # while its tensor lives
        await until(lambda: states(store) == {"free": 1})
        new, new_digest = answer(store, other, seed=3)
        assert (new.segment, new.epoch) == (handle.segment, 2)
        assert await second.ask("fetch", handle=new) == new_digest
        assert await second.ask("mappings") == 1  # the old epoch is unmapped
        assert await first.ask("look") == expected


async def test_door_that_closes_leaves_tensors_good_and_hangs_up_after_the_last(
    tmp_path: Path, consumers: Consumers
) -> None:
    async with slab(tmp_path, slots=1) as store, client(consumers, store) as (consumer, session):
        handle, expected = answer(store, session, seed=1)
        await consumer.ask("fetch", handle=handle)
        await consumer.ask("close_door")
        with pytest.raises(Unavailable):
            await consumer.ask("fetch", handle=handle, name="again")
        assert await consumer.ask("look") == expected
        assert states(store) == {"held": 1}
        await consumer.ask("drop")
        await until(lambda: states(store) == {"free": 1})
        assert await consumer.ask("mappings") == 0


async def test_forked_child_neither_releases_nor_hides_its_parent(tmp_path: Path, consumers: Consumers) -> None:
    async with slab(tmp_path, slots=1) as store, client(consumers, store) as (consumer, session):
        handle, expected = answer(store, session, seed=1)
        await consumer.ask("fetch", handle=handle)
        assert await consumer.ask("fork_and_die_there") == "closed"
        assert await consumer.ask("look") == expected
        assert states(store) == {"held": 1}


async def test_every_session_reads_a_shared_segment(tmp_path: Path, consumers: Consumers) -> None:
    weight = np.random.default_rng(0).standard_normal((1000, 33), dtype=np.float32)
    bias = np.arange(1000, dtype=np.float32)
    async with (
        slab(tmp_path, slots=1) as store,
        client(consumers, store, "a") as (first, session),
        client(consumers, store, "b") as (second, _),
    ):
        handles = await store.add_shared_segment(
            [
                Matrix(data=weight.data, rows=1000, cols=33, dtype=DType.FLOAT32),
                Matrix(data=bias.data, rows=1, cols=1000, dtype=DType.FLOAT32),
            ]
        )
        assert all(handle.segment >= 1 and handle.offset_bytes % 64 == 0 for handle in handles)
        for _ in range(2):  # never claimed, so as often as one likes
            for consumer in (first, second):
                assert await consumer.ask("fetch", handle=handles[0]) == digest(weight.tobytes())
                assert await consumer.ask("fetch", handle=handles[1], name="bias") == digest(bias.tobytes())
                assert await consumer.ask("mappings") == 1
        store.close_session(session)
        with pytest.raises(HandleGone):
            await first.ask("fetch", handle=handles[0])
        assert await first.ask("look") == digest(weight.tobytes())


async def test_bytes_outlive_the_server(tmp_path: Path, consumers: Consumers) -> None:
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(slab(tmp_path))
        consumer, session = await stack.enter_async_context(client(consumers, store))
        handle, expected = answer(store, session, seed=1)
        await consumer.ask("fetch", handle=handle)
        next_handle, _ = answer(store, session, seed=2)
        await store.__aexit__(None, None, None)
        assert await consumer.ask("look") == expected
        with pytest.raises(Unavailable):
            await consumer.ask("fetch", handle=next_handle, name="again")
        await consumer.ask("drop")
        assert await consumer.ask("mappings") == 0


async def test_many_consumers_that_are_killed_while_they_read_see_no_wrong_byte(
    tmp_path: Path, consumers: Consumers
) -> None:
    chance = random.Random(7)
    read, killed = list[bool](), list[int]()
    async with slab(tmp_path, slots=4) as store:
        is_free = asyncio.Event()
        store.on_free = is_free.set
        end = asyncio.get_running_loop().time() + 3

        async def live_and_die(first_value: int) -> None:
            value = first_value
            while asyncio.get_running_loop().time() < end:
                async with client(consumers, store) as (consumer, session):
                    for _ in range(chance.randrange(3, 30)):
                        while (lease := store.try_acquire(session)) is None:
                            is_free.clear()
                            await asyncio.wait_for(is_free.wait(), 2)
                        value += 1
                        np.frombuffer(lease.buffer, np.float32)[:] = value
                        handle = store.publish(lease, rows=64, cols=SLOT_BYTES // 256, dtype=DType.FLOAT32)
                        read.append(await consumer.ask("use", handle=handle, value=value))
                    lease = store.try_acquire(session)
                    if lease is not None:
                        handle = store.publish(lease, rows=1, cols=1, dtype=DType.FLOAT32)
                        await consumer.tell("use", handle=handle, value=0)
                    consumer.signal(signal.SIGKILL)  # with an answer unclaimed, or in its hands
                    killed.append(consumer.pid)

        await asyncio.gather(*(live_and_die(1000 * i) for i in range(4)))
        # A socket that closes frees its slots a moment before the process's death ends the session.
        await until(lambda: states(store) == {"free": 4} and not store.snapshot().sessions)
        assert store.snapshot().orphans == 0
    assert len(killed) >= 4 and len(read) > 20
    assert all(read)
