"""The RDMA door against a slab, and against a server that lies."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdmesh.errors import HandleGone, Unavailable
from kdmesh.handles.doors.rdma import RdmaDoor, ServerCalls
from kdmesh.handles.rdma.agent import RemoteMemory
from kdmesh.handles.rdma.buffers import Graveyard
from kdmesh.handles.rdma.memory import RdmaMemory
from kdmesh.handles.slab.store import SlabStore
from kdmesh.types import Handle
from tests.support.handles_consumer import digest, until
from tests.support.handles_slab import answer, slab, states

pytestmark = pytest.mark.rdma


class Server:
    """A slab that is read by RDMA, without the rpcs in between."""

    def __init__(self, store: SlabStore, memory: RdmaMemory) -> None:
        self.store = store
        self.memory = memory
        self.session = store.open_session("job")
        self.lie: Callable[[RemoteMemory], RemoteMemory] = lambda memory: memory
        self.before_end: Callable[[], Awaitable[None]] | None = None

    async def locate(self, handle: Handle | None) -> RemoteMemory:
        if handle is None:
            return self.lie(await self.memory.probe())
        segment, _ = self.store.find(self.session, handle)
        return self.lie(await self.memory.locate(segment))

    async def end(self, handle: Handle) -> None:
        if self.before_end is not None:
            await self.before_end()
        if not self.store.release(self.session, handle):
            raise HandleGone("ended")

    def abandon(self, handle: Handle) -> None:
        self.store.release(self.session, handle)

    async def door(self, *, buried: Graveyard | None = None, read_s: float = 5) -> RdmaDoor:
        calls = ServerCalls(locate=self.locate, end=self.end, abandon=self.abandon)
        return await RdmaDoor.connect(calls, self.store.nonce, read_s=read_s, buried=buried or Graveyard())


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, *, slots: int = 2, claim_s: float = 60) -> AsyncIterator[Server]:
    async with slab(tmp_path, slots=slots, claim_s=claim_s) as store:
        memory = RdmaMemory()
        memory.serve(store.nonce, store.slots)
        try:
            yield Server(store, memory)
        finally:
            memory.close()


def look(tensor: torch.Tensor) -> str:
    return digest(tensor.view(torch.uint8).numpy().data)


async def test_slot_is_free_when_its_bytes_have_come_and_buffers_are_used_again(tmp_path: Path) -> None:
    async with serving(tmp_path, slots=1) as server:
        door = await server.door()
        seen = set()
        for seed in range(6):
            handle, expected = answer(server.store, server.session, seed)
            tensor = await door.fetch(handle)
            assert states(server.store) == {"free": 1}
            assert look(tensor) == expected
            seen.add(tensor.data_ptr())
        assert len(seen) <= 2  # the tensor before was still alive when the next was read
        door.close()


async def test_answer_that_ended_while_it_was_read_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, slots=1) as server:
        door = await server.door()
        handle, _ = answer(server.store, server.session, seed=1)

        async def overwritten() -> None:
            server.store.release(server.session, handle)
            answer(server.store, server.session, seed=2)

        server.before_end = overwritten
        with pytest.raises(HandleGone):
            await door.fetch(handle)
        server.before_end = None
        stale = replace(handle, epoch=7)
        with pytest.raises(HandleGone):
            await door.fetch(stale)
        assert states(server.store) == {"ready": 1}
        door.close()


async def test_replaced_memory_is_read_and_the_old_is_not_registered_any_more(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        door = await server.door()
        for seed in range(4):  # new memory often lies where some older did
            handle, expected = answer(server.store, server.session, seed)
            assert handle.epoch == seed + 1
            assert look(await door.fetch(handle)) == expected
            await server.store.replace_memory()
        numbers = {segment.number for segment in server.store.slots}
        assert len(set(server.memory._own) - numbers) == 1  # the probe
        door.close()


@pytest.mark.parametrize("cut", [0, 1, 40, 100, 250, -1])
async def test_metadata_that_is_none_is_refused(tmp_path: Path, cut: int) -> None:
    async with serving(tmp_path) as server:
        door = await server.door()
        server.lie = lambda memory: replace(memory, metadata=memory.metadata[:cut])
        handle, _ = answer(server.store, server.session, seed=1)
        with pytest.raises(Unavailable, match="metadata"):
            await door.fetch(handle)
        with pytest.raises(Unavailable):
            await server.door()
        server.lie = lambda memory: replace(memory, metadata=os.urandom(300))
        with pytest.raises(Unavailable, match="metadata"):
            await server.door()
        assert states(server.store) == {"free": 2}
        door.close()


async def test_memory_of_another_agent_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        other = RdmaMemory()
        other.serve(bytes(16), ())
        foreign = await other.probe()
        server.lie = lambda memory: replace(memory, metadata=foreign.metadata)
        with pytest.raises(Unavailable, match="is of agent"):
            await server.door()
        server.lie = lambda memory: foreign
        with pytest.raises(Unavailable, match="another server"):
            await server.door()
        server.lie = lambda memory: memory
        door = await server.door()
        server.lie = lambda memory: foreign
        handle, _ = answer(server.store, server.session, seed=1)
        with pytest.raises(Unavailable, match="agent"):
            await door.fetch(handle)
        door.close()
        other.close()


async def test_address_outside_what_is_registered_is_refused_by_the_reader(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        door = await server.door()
        server.lie = lambda memory: replace(memory, address=memory.address + memory.size_bytes)
        buried = door._graveyard
        handle, _ = answer(server.store, server.session, seed=1)
        with pytest.raises(Unavailable, match="NotFound"):
            await door.fetch(handle)
        assert buried.size_bytes > 0
        door.close()


async def test_cancelled_fetch_gives_its_slot_back_and_the_door_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        door = await server.door()
        handle, _ = answer(server.store, server.session, seed=1)
        fetching = asyncio.create_task(door.fetch(handle))
        await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await until(lambda: states(server.store) == {"free": 2})
        handle, expected = answer(server.store, server.session, seed=2)
        assert look(await door.fetch(handle)) == expected
        door.close()


async def test_closed_door_fetches_no_more_and_its_tensors_stay_good(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        door = await server.door()
        handle, expected = answer(server.store, server.session, seed=1)
        tensor = await door.fetch(handle)
        door.close()
        other, _ = answer(server.store, server.session, seed=2)
        with pytest.raises(Unavailable, match="closed"):
            await door.fetch(other)
        assert states(server.store) == {"free": 2}
        del door
        gc.collect()
        assert look(tensor) == expected


async def test_full_graveyard_closes_the_door(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        buried = Graveyard(max_bytes=1)
        door = await server.door(buried=buried)
        server.lie = lambda memory: replace(memory, address=memory.address + memory.size_bytes)
        handle, _ = answer(server.store, server.session, seed=1)
        with pytest.raises(Unavailable):
            await door.fetch(handle)
        server.lie = lambda memory: memory
        with pytest.raises(Unavailable, match="restart this process"):
            await server.door(buried=buried)


async def test_nothing_is_left_of_doors_and_memories(tmp_path: Path) -> None:
    def resources() -> tuple[int, int]:
        gc.collect()
        pool = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())  # the loop's own
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")) - pool

    async def once() -> None:
        async with serving(tmp_path) as server:
            doors = [await server.door() for _ in range(2)]
            for door in doors:
                handle, expected = answer(server.store, server.session, seed=1)
                assert look(await door.fetch(handle)) == expected
                door.close()

    await once()
    before = resources()
    for _ in range(3):
        await once()
    await until(lambda: resources() <= before, within_s=20)
