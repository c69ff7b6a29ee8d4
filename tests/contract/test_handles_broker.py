"""The broker lends to whom it should, and nobody can upset it."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmesh.errors import ConfigError, HandleGone, Unavailable
from kdmesh.handles.doors.door import Door
from kdmesh.handles.doors.shm import ShmDoor
from kdmesh.handles.slab import broker
from kdmesh.handles.slab.messages import MAX_UNANSWERED, VERSION, Op, Request
from kdmesh.handles.slab.shared import Matrix
from kdmesh.handles.slab.store import SlabStore
from kdmesh.types import DType
from tests.support.descriptors import nothing_left_open
from tests.support.handles_consumer import digest, until
from tests.support.handles_slab import answer, slab, states


async def door_to(store: SlabStore) -> tuple[ShmDoor, bytes]:
    session = store.open_session("job")
    return await ShmDoor.connect(store.socket_path, session, store.nonce), session


@contextmanager
def raw(store: SlabStore) -> Iterator[socket.socket]:
    """A client that says what it likes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        sock.connect(str(store.socket_path))
        yield sock


async def hears(sock: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 64), 2)


# The socket


async def test_socket_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "new" / "broker.sock"
    before = named_memory()
    with nothing_left_open():
        async with slab(tmp_path / "new"):
            assert named_memory() == before  # its memory has no name that it could leave behind
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
    assert named_memory() == before


def named_memory() -> set[str]:
    """Files of /dev/shm that this process has mapped; what else lies there is that of others."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}


async def test_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "broker.sock"))
        dead.listen()
    async with slab(tmp_path) as store:
        door, _ = await door_to(store)
        door.close()


async def test_socket_of_a_live_server_is_left_alone(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        with pytest.raises(ConfigError, match="live server"):
            async with slab(tmp_path):
                pass
        door, _ = await door_to(store)
        door.close()


async def test_file_of_somebody_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "broker.sock").write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"):
        async with slab(tmp_path):
            pass
    assert (tmp_path / "broker.sock").read_text() == "mine"


async def test_socket_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        async with slab(tmp_path / ("x" * 300)):
            pass


async def test_socket_may_lie_deeper_than_its_address_may_be_long(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    async with slab(deep) as store:
        session = store.open_session("job")
        door = await ShmDoor.connect(store.socket_path, session, store.nonce)
        door.close()
        with pytest.raises(ConfigError, match="a live server"):
            async with slab(deep):
                pass
    assert not (deep / "broker.sock").exists()


# The same node


async def test_other_users_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with slab(tmp_path) as store:
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
        with pytest.raises(Unavailable):
            await door_to(store)
        assert store.snapshot().connections == 0


async def test_server_with_another_nonce_is_another_server(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        session = store.open_session("job")
        with pytest.raises(Unavailable, match="another server"):
            await ShmDoor.connect(store.socket_path, session, bytes(16))
        assert store.is_open(session)  # it may use another door


async def test_session_that_has_ended_is_gone(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        with pytest.raises(HandleGone):
            await ShmDoor.connect(store.socket_path, bytes(16), store.nonce)


@pytest.mark.parametrize("kind", ["nothing", "file", "dead", "mute", "stream"])
async def test_socket_that_leads_nowhere_is_unavailable(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broker.sock"
    type_of_socket = socket.SOCK_STREAM if kind == "stream" else socket.SOCK_SEQPACKET
    with nothing_left_open(), socket.socket(socket.AF_UNIX, type_of_socket) as other:
        if kind == "file":
            path.write_text("")
        elif kind != "nothing":
            other.bind(str(path))
        if kind in ("mute", "stream"):
            other.listen()
        with pytest.raises(Unavailable, match=str(path)):
            await ShmDoor.connect(path, bytes(16), bytes(16), timeout_s=0.05)


# What clients say


@pytest.mark.parametrize(
    "opening",
    [
        Request(Op.CLAIM, 0, 1, bytes(16)),
        Request(Op.RELEASE, 0, 1, bytes(16)),
        Request(Op.HELLO, VERSION + 1, 0, bytes(16)),
    ],
)
async def test_client_that_does_not_say_hello_is_hung_up_on(tmp_path: Path, opening: Request) -> None:
    async with slab(tmp_path) as store:
        with raw(store) as sock:
            sock.send(opening.pack())
            assert await hears(sock) == b""


async def test_client_that_talks_garbage_loses_its_slots_and_nobody_else(tmp_path: Path) -> None:
    chance = random.Random(0)
    async with slab(tmp_path) as store:
        door, session = await door_to(store)
        handle, expected = answer(store, session, seed=1)
        tensor = await door.fetch(handle)
        for length in (1, 27, 28, 29, 63, 64, 2000):
            other = store.open_session("garbage")
            taken, _ = answer(store, other, seed=2)
            with raw(store) as sock:
                sock.send(Request(Op.HELLO, VERSION, 0, other).pack())
                assert len(await hears(sock)) == 32
                sock.send(Request(Op.CLAIM, taken.segment, taken.epoch, taken.token).pack())
                assert len(await hears(sock)) == 32
                assert states(store) == {"held": 2}
                sock.send(b"\xff" + chance.randbytes(length - 1))
                assert await hears(sock) == b""
            assert states(store) == {"free": 1, "held": 1}
            store.close_session(other)
        assert digest(tensor.view(torch.uint8).numpy().data) == expected
        door.close()


async def test_client_that_hangs_up_and_lives_keeps_its_session_and_what_it_has_not_mapped(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        session = store.open_session("job")
        mapped, _ = answer(store, session, seed=1)
        ready, _ = answer(store, session, seed=2)
        with raw(store) as sock:
            sock.send(Request(Op.HELLO, VERSION, 0, session).pack())
            await hears(sock)
            sock.send(Request(Op.CLAIM, mapped.segment, mapped.epoch, mapped.token).pack())
            await hears(sock)
        await until(lambda: states(store) == {"free": 1, "ready": 1})
        assert store.find(session, ready)[1] == ready


async def test_client_that_never_listens_is_hung_up_on(tmp_path: Path) -> None:
    async with slab(tmp_path) as store:
        session = store.open_session("job")
        with raw(store) as sock:
            sock.send(Request(Op.HELLO, VERSION, 0, session).pack())
            claim = Request(Op.CLAIM, 0, 1, bytes(16)).pack()
            with pytest.raises(ConnectionError):
                for _ in range(100_000):
                    await asyncio.get_running_loop().sock_sendall(sock, claim)


async def test_broker_out_of_descriptors_accepts_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "_ACCEPT_AGAIN_S", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with slab(tmp_path) as store:
        session = store.open_session("job")
        with raw(store) as sock:
            used = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(used, sock.fileno() + 1), hard))
            try:
                sock.send(Request(Op.HELLO, VERSION, 0, session).pack())
                await until(lambda: store._broker._listener not in _readers())
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len(await hears(sock)) == 32


def _readers() -> list[object]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, asyncio.SelectorEventLoop)
    return [key.fileobj for key in loop._selector.get_map().values()]  # type: ignore[attr-defined]


# The door


async def test_views_autograd_and_threads_keep_a_tensor(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=1) as store:
        door, session = await door_to(store)
        opened: Door = door
        handle, _ = answer(store, session, seed=1)
        rows = torch.nan_to_num(await opened.fetch(handle))
        await until(lambda: states(store) == {"free": 1})  # only a copy was kept

        lease = store.try_acquire(session)
        assert lease is not None
        np.frombuffer(lease.buffer, np.float32)[:] = 2
        rows = await door.fetch(store.publish(lease, rows=64, cols=256, dtype=DType.FLOAT32))
        weight = torch.ones(256, requires_grad=True)
        loss = (rows[8:] @ weight).sum()
        del rows  # the graph still has a view
        await asyncio.sleep(0)
        assert states(store) == {"held": 1}
        loss.backward()
        assert weight.grad is not None and (weight.grad == 2 * 56).all()
        del loss
        await until(lambda: states(store) == {"free": 1})
        door.close()


async def test_tensor_that_dies_in_a_cycle_in_another_thread_is_released(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=1) as store:
        door, session = await door_to(store)
        handle, _ = answer(store, session, seed=1)
        cycle: list[object] = [await door.fetch(handle)]
        cycle.append(cycle)
        del cycle
        assert states(store) == {"held": 1}
        collector = threading.Thread(target=gc.collect)
        collector.start()
        await until(lambda: states(store) == {"free": 1})
        collector.join()
        door.close()


async def test_fetch_that_is_cancelled_before_its_turn_gives_the_slot_back(tmp_path: Path) -> None:
    slots = MAX_UNANSWERED + 1
    async with slab(tmp_path, slots=slots) as store:
        door, session = await door_to(store)
        handles = [answer(store, session, seed)[0] for seed in range(slots)]
        fetching = [asyncio.create_task(door.fetch(handle)) for handle in handles]
        await asyncio.sleep(0)  # each has begun, and the last one waits for an answer to another
        fetching[-1].cancel()
        tensors = await asyncio.gather(*fetching[:-1])
        await until(lambda: states(store) == {"held": slots - 1, "free": 1})
        del tensors
        door.close()


async def test_fetch_that_is_cancelled_gives_the_slot_back(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=1) as store:
        door, session = await door_to(store)
        handle, _ = answer(store, session, seed=1)
        fetching = asyncio.create_task(door.fetch(handle))
        await asyncio.sleep(0)  # it has asked
        fetching.cancel()
        await until(lambda: store.snapshot().counters.released == 1)
        handle, expected = answer(store, session, seed=2)
        assert digest((await door.fetch(handle)).view(torch.uint8).numpy().data) == expected
        door.close()


async def test_thousand_tensors_at_once_come_and_go(tmp_path: Path) -> None:
    async with slab(tmp_path, slots=1) as store:
        door, session = await door_to(store)
        rows = np.arange(64, dtype=np.float32)
        (shared,) = await store.add_shared_segment([Matrix(data=rows.data, rows=8, cols=8, dtype=DType.FLOAT32)])
        tensors = await asyncio.gather(*(door.fetch(shared) for _ in range(1000)))
        assert all(tensor.sum() == rows.sum() for tensor in tensors)
        handle, _ = answer(store, session, seed=1)
        tensors.append(await door.fetch(handle))
        del tensors  # more releases than the socket takes at once, and the slot's is the last
        await until(lambda: states(store) == {"free": 1})
        door.close()


async def test_fetch_fails_when_the_server_goes(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.setblocking(False)
        listener.bind(str(tmp_path / "broker.sock"))
        listener.listen()
        async with slab(tmp_path / "real") as store:
            session = store.open_session("job")
            handle, _ = answer(store, session, seed=1)
        connecting = asyncio.create_task(ShmDoor.connect(tmp_path / "broker.sock", session, bytes(16)))
        server, _ = await asyncio.get_running_loop().sock_accept(listener)
        with server:
            server.send(bytes(32))  # OK, and the nonce
            door = await connecting
            fetching = asyncio.create_task(door.fetch(handle))
            await hears(server)
            assert len(await hears(server)) == 28
        with pytest.raises(Unavailable, match="closed its shared memory"):
            await fetching
        with pytest.raises(Unavailable):
            await door.fetch(handle)
        door.close()
