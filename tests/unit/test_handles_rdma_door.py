"""The RDMA door's own rules, with an agent that copies within this process instead of NIXL's."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import threading
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdmesh.errors import ConfigError, EngineFailure, HandleGone, Unavailable
from kdmesh.handles.doors import rdma as rdma_door
from kdmesh.handles.doors.rdma import RdmaDoor, ServerCalls
from kdmesh.handles.rdma.agent import (
    UNSAFE_VALUE,
    UNSAFE_VARIABLE,
    Agent,
    OwnMemory,
    RemoteMemory,
    Transfer,
    check_transports,
)
from kdmesh.handles.rdma.buffers import Graveyard
from kdmesh.types import DType, Handle
from tests.support.handles_consumer import until

NONCE = bytes(range(16))


class CopyingAgent:
    """Reads at once, or never, or fails; counts what it knows."""

    def __init__(self, *, is_read: bool) -> None:
        self.registered: list[OwnMemory] = []
        self.peers: list[RemoteMemory] = []
        self.farewells = 0
        self.hangs = False
        self.failure: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()

    def register(self, address: int, size_bytes: int) -> OwnMemory:
        own = OwnMemory(address=address, size_bytes=size_bytes, registration=None)
        self.registered.append(own)
        return own

    def deregister(self, memory: OwnMemory) -> None:
        self.registered.remove(memory)

    def add_peer(self, memory: RemoteMemory) -> None:
        self.peers.append(memory)

    def remove_peer(self, name: str) -> None:
        self.farewells += 1
        self.peers.clear()

    def begin_read(self, source: RemoteMemory, target: OwnMemory, *, offset_bytes: int, size_bytes: int) -> Transfer:
        self.answers.wait()
        if self.failure is not None:
            raise self.failure
        assert source in self.peers
        if not self.hangs:
            ctypes.memmove(target.address, source.address + offset_bytes, size_bytes)
        return Transfer(number=1, is_done=not self.hangs)

    def poll(self, transfer: Transfer) -> Transfer:
        return replace(transfer, is_done=not self.hangs)

    def end(self, transfer: Transfer) -> None:
        assert transfer.is_done


class Server:
    """One segment of this process."""

    def __init__(self) -> None:
        self.memory = np.zeros(4096, np.uint8)
        self.nonce = np.frombuffer(NONCE, np.uint8).copy()
        self.ended: list[Handle] = []
        self.abandoned: list[Handle] = []
        self.located = 0
        self.is_gone = False

    def at(self, memory: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> RemoteMemory:
        return RemoteMemory(agent="server", metadata=b"", address=memory.ctypes.data, size_bytes=memory.nbytes)

    async def locate(self, handle: Handle | None) -> RemoteMemory:
        self.located += 1
        return self.at(self.nonce if handle is None else self.memory)

    async def end(self, handle: Handle) -> None:
        self.ended.append(handle)
        if self.is_gone:
            raise HandleGone("gone")

    async def door(self, buried: Graveyard | None = None) -> tuple[RdmaDoor, CopyingAgent]:
        calls = ServerCalls(locate=self.locate, end=self.end, abandon=self.abandoned.append)
        door = await RdmaDoor.connect(calls, NONCE, read_s=0.3, buried=buried or Graveyard())
        agent = door._agent
        assert isinstance(agent, CopyingAgent)
        return door, agent


@pytest.fixture(autouse=True)
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma_door, "Agent", CopyingAgent)
    monkeypatch.setenv("UCX_TLS", "rc")


def handle(*, epoch: int = 1, rows: int = 10, offset_bytes: int = 64) -> Handle:
    return Handle(
        segment=0, epoch=epoch, token=bytes(16), offset_bytes=offset_bytes, rows=rows, cols=8, dtype=DType.FLOAT32
    )


@pytest.mark.parametrize("named", ["rc", "rc_mlx5,self", "dc_x, rc_x", "self,rc_v,"])
def test_rdma_transports_are_taken(named: str) -> None:
    check_transports({"UCX_TLS": named})


@pytest.mark.parametrize(
    "named", ["", "all", "ib", "ud", "rc,tcp", "^tcp", "rc,ud", "self", "tcp", "rc,sm", "rc,cma", "RC"]
)
def test_anything_else_is_refused(named: str) -> None:
    with pytest.raises(ConfigError, match="UCX_TLS"):
        check_transports({"UCX_TLS": named})
    with pytest.raises(ConfigError, match="UCX_TLS"):
        check_transports({"UCX_TLS": named, UNSAFE_VARIABLE: "1"})


@pytest.mark.parametrize("environ", [{}, {"UCX_TLS": "tcp"}])
def test_switch_for_tests_is_loud(environ: Mapping[str, str], caplog: pytest.LogCaptureFixture) -> None:
    check_transports({**environ, UNSAFE_VARIABLE: UNSAFE_VALUE})
    assert "UNSAFE" in caplog.text


def test_nixl_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'kdmesh\[rdma\]'"):
        Agent(is_read=True)


async def test_segment_is_located_once_in_each_epoch() -> None:
    server = Server()
    door, agent = await server.door()
    server.memory[64:384] = np.arange(80, dtype=np.float32).view(np.uint8)
    for _ in range(3):
        assert torch.equal(await door.fetch(handle()), torch.arange(80.0).view(10, 8))
    assert (server.located, len(server.ended), agent.farewells) == (2, 3, 0)  # the nonce, and the segment
    await door.fetch(handle(epoch=2))
    assert (server.located, len(server.abandoned)) == (3, 0)


async def test_memory_in_the_place_of_other_memory_is_learned_anew() -> None:
    server = Server()
    door, agent = await server.door()
    await door.fetch(handle())
    server.memory = server.memory[64:]  # other memory, partly where the old one was
    await door.fetch(handle(epoch=2))
    assert agent.farewells == 1
    assert agent.peers == [server.at(server.memory)]


async def test_late_read_ends_the_door_and_its_buffer_is_never_used_again() -> None:
    server, buried = Server(), Graveyard()
    door, agent = await server.door(buried)
    agent.hangs = True
    with pytest.raises(Unavailable, match="did not end within"):
        await door.fetch(handle())
    with pytest.raises(Unavailable, match="did not end within"):
        await door.fetch(handle())
    assert server.abandoned == [handle(), handle()]
    assert len(buried._buried) == 1
    assert buried._buried[0][1].own in agent.registered


async def test_reads_under_way_end_with_the_door_and_are_kept() -> None:
    server, buried = Server(), Graveyard()
    door, agent = await server.door(buried)
    agent.hangs = True
    fetching = [asyncio.create_task(door.fetch(handle())) for _ in range(3)]
    await until(lambda: door._num_reading == 3)
    door.close()
    for done in await asyncio.gather(*fetching, return_exceptions=True):
        assert isinstance(done, Unavailable)
    assert len(buried._buried) == 3


async def test_call_that_hangs_ends_with_the_deadline_of_its_read() -> None:
    server, buried = Server(), Graveyard()
    door, agent = await server.door(buried)
    agent.answers.clear()
    with pytest.raises(Unavailable, match="did not end within"):
        await door.fetch(handle())
    door.close()
    with pytest.raises(Unavailable, match="did not end within"):
        await door.fetch(handle())
    assert len(buried._buried) == 1
    agent.answers.set()


async def test_failed_read_is_told_and_its_buffer_is_kept() -> None:
    server, buried = Server(), Graveyard()
    door, agent = await server.door(buried)
    agent.failure = Unavailable("RDMA: disconnected")
    with pytest.raises(Unavailable, match="disconnected"):
        await door.fetch(handle())
    assert len(buried._buried) == 1
    assert server.abandoned == [handle()]


async def test_bytes_of_a_handle_that_ended_are_not_delivered() -> None:
    server = Server()
    door, _ = await server.door()
    server.is_gone = True
    with pytest.raises(HandleGone):
        await door.fetch(handle())
    server.is_gone = False
    await door.fetch(handle())  # the door goes on


async def test_handle_beyond_its_segment_is_refused() -> None:
    server = Server()
    door, _ = await server.door()
    with pytest.raises(EngineFailure, match="does not fit in its segment 0 of 4096 bytes"):
        await door.fetch(handle(rows=127))
    assert server.abandoned


async def test_other_server_behind_the_nonce_is_not_used() -> None:
    server = Server()
    server.nonce[3] += 1
    with pytest.raises(Unavailable, match="another server"):
        await server.door()


@pytest.mark.parametrize(("limits", "num_failures"), [({"max_bytes": 100}, 1), ({"max_agents": 3}, 3)])
async def test_full_graveyard_opens_no_door(limits: dict[str, int], num_failures: int) -> None:
    server, buried = Server(), Graveyard(**limits)
    for _ in range(num_failures):
        door, agent = await server.door(buried)
        agent.hangs = True
        with pytest.raises(Unavailable):
            await door.fetch(handle())
    with pytest.raises(Unavailable, match="restart this process"):
        await server.door(buried)


async def test_spares_do_not_pile_up() -> None:
    server = Server()
    door, agent = await server.door()
    server.memory = np.zeros(2**20, np.uint8)
    kept = [await door.fetch(handle(rows=rows)) for rows in range(100, 3000, 100)]
    kept.clear()
    await door.fetch(handle())
    assert len(agent.registered) <= 9
