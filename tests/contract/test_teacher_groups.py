"""Rows come through a private group of client and server; whatever goes wrong costs that client only."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.groups.pair_group import PairGroup
from kdmesh.handles.doors.shm import ShmDoor
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers import row_pieces
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.teacher_process import TeacherProcess, started, teacher_process, teacher_processes, wait_event
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher

GROUPS = {"groups": True}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_pieces, "PIECE_BYTES", 400)


async def _ask(client: TeacherClient, seed: int) -> None:
    asked = [sequence(30, seed=seed), sequence(40, seed=seed + 100)]
    rows = await client.prefill(asked, Deadline.after(10))
    assert torch.equal(rows.rows_RD, expected_rows(asked))
    assert not rows.is_borrowed


def _threads() -> int:
    return int(psutil.Process().num_threads())


async def _sent(teacher: RunningTeacher) -> dict[str, float]:
    async with httpx.AsyncClient() as rest:
        text = (await rest.get(f"http://{teacher.addresses.rest}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("kdmesh_teacher_bytes_total{")]
    return {line.split('"')[1]: float(line.split()[1]) for line in lines}


@pytest.mark.usefixtures("small_pieces")
async def test_rows_and_head_come_through_a_group(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, server=GROUPS) as teacher, teacher.client(door="collective") as client:
        assert client.door.name == "collective"
        async with asyncio.TaskGroup() as asking:
            for seed in range(10):
                asking.create_task(_ask(client, seed))
        head, _ = await client.head()
        assert head.weight_VD.shape == (64, 8)
        sent = await _sent(teacher)
        assert sent["collective"] > 10 * 70 * 32 * 0.9 and sent["stream"] == sent["shm"] == 0


async def test_a_server_without_groups_is_a_configuration_error(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        with pytest.raises(ConfigError, match=r"door collective, but .* makes no groups"):
            async with teacher.client(door="collective"):
                pass


async def test_auto_says_why_it_took_no_other_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*arguments: object, **options: object) -> ShmDoor:
        raise Unavailable("no shared memory through /there: another node")

    monkeypatch.setattr(ShmDoor, "connect", connect)
    async with running_teacher(tmp_path, server=GROUPS) as teacher, teacher.client(door="auto") as client:
        assert client.door.name == "stream"
        assert client.door_reason == (
            "shm: no shared memory through /there: another node; rdma: the server has no RDMA; "
            "collective: without a GPU on both sides a group is no faster than a stream"
        )


async def test_a_group_leaves_nothing_behind(tmp_path: Path) -> None:
    """gRPC's and asyncio's pools may still grow by a thread or two; a group that stayed would add one each time."""
    async with running_teacher(tmp_path, server=GROUPS) as teacher:
        counts = []
        for _ in range(12):
            async with teacher.client(door="collective") as client:
                await _ask(client, 1)
            counts.append(_threads())
        assert counts[-1] - counts[0] < len(counts) / 2, counts


@pytest.mark.usefixtures("small_pieces")
async def test_a_broken_group_is_made_anew_and_its_rows_are_asked_for_again(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, server=GROUPS) as teacher, teacher.client(door="collective") as client:
        await _ask(client, 1)
        broken = client.door._group  # type: ignore[attr-defined]
        broken.leave()
        with pytest.raises(Unavailable):
            await _ask(client, 2)
        await _ask(client, 3)
        assert client.door._group is not broken  # type: ignore[attr-defined]


@pytest.mark.usefixtures("small_pieces")
async def test_bytes_that_change_on_the_way_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = PairGroup.send

    def spoil(self: PairGroup, data: memoryview, timeout_s: float) -> None:
        changed = bytearray(data)
        changed[-1] ^= len(changed) == 400  # not the halves of the secret
        send(self, memoryview(changed), timeout_s)

    async with running_teacher(tmp_path, server=GROUPS) as teacher, teacher.client(door="collective") as client:
        monkeypatch.setattr(PairGroup, "send", spoil)
        with pytest.raises(Unavailable, match="wrong checksum"):
            await _ask(client, 1)
        monkeypatch.setattr(PairGroup, "send", send)
        await _ask(client, 1)


async def test_a_client_that_never_receives_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo takes what fits in the socket's buffers; the rest waits for the receiver, on a thread of its own."""
    monkeypatch.setattr(row_pieces, "PIECE_BYTES", 2**23)
    wide = {"hidden_size": 2**16}
    slab = {"slots": 3, "slot_mib": 16, "lease_s": 1.0}
    async with (
        running_teacher(tmp_path, server=GROUPS, engine=wide, slab=slab) as teacher,
        teacher.client(door="collective", job="lazy") as lazy,
        teacher.client(door="collective", job="keen") as keen,
    ):
        group = lazy.door._group  # type: ignore[attr-defined]

        async def never(place: torch.Tensor, timeout_s: float) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(group._channel, "receive", never)
        asking = asyncio.create_task(lazy.prefill([sequence(60, seed=1)], Deadline.after(10)))
        for seed in range(3):
            asked = [sequence(10, seed=seed)]
            rows = await keen.prefill(asked, Deadline.after(10))
            assert torch.equal(rows.rows_RD, expected_rows(asked, hidden_size=2**16))
        assert not asking.done()
        asking.cancel()
        await asyncio.wait([asking])


CLIENT = """
import asyncio, logging, sys
from kdmesh import log
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions
from tests.support.teacher_requests import sequence

async def main():
    log.configure(service="test")
    client = await TeacherClient.connect(sys.argv[1], SessionOptions(job="other", door="collective"))
    async def stall(place, timeout_s):
        logging.getLogger("kdmesh.test").info("about to receive")
        await asyncio.Event().wait()
    client.door._group._channel.receive = stall
    await client.prefill([sequence(60, seed=1)], Deadline.after(3600))

asyncio.run(main())
"""


@contextmanager
def _stalled_client(tmp_path: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    with started(tmp_path, "-c", CLIENT, address) as process:
        wait_event(process, "about to receive")
        yield process


def test_clients_that_are_killed_or_stopped_give_their_slots_back(tmp_path: Path) -> None:
    slab = {"slots": 2, "slot_mib": 16, "lease_s": 1.0}
    with (
        teacher_process(tmp_path, server=GROUPS, engine={"hidden_size": 2**16}, slab=slab) as teacher,
        _stalled_client(tmp_path, teacher.grpc) as killed,
        _stalled_client(tmp_path, teacher.grpc) as stopped,
        TeacherPool([teacher.grpc], job="test", door="collective", deadline_s=60) as pool,
    ):
        before = _num_threads(teacher)
        killed.kill()
        stopped.send_signal(signal.SIGSTOP)
        asked = [sequence(10, seed=3)]
        assert torch.equal(pool.submit(asked).wait().rows_RD, expected_rows(asked, hidden_size=2**16))
        teacher.until_slots("free", 2)
        while _num_threads(teacher) > before - 2:  # those that sent
            pass


def _num_threads(teacher: TeacherProcess) -> int:
    return len(list(Path(f"/proc/{teacher.process.pid}/task").iterdir()))


def test_servers_that_are_killed_or_stopped_are_left_for_another(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {"server": GROUPS, "slab": {"lease_s": 1.0}}
    with (
        teacher_processes(tmp_path, sections, sections, sections) as (killed, stopped, other),
        TeacherPool([killed.grpc, stopped.grpc, other.grpc], job="test", door="collective", deadline_s=60) as pool,
    ):
        assert list(pool.stats().doors) == ["collective"]
        killed.signal(signal.SIGKILL)
        stopped.signal(signal.SIGSTOP)
        groups = [[sequence(50, seed=seed)] for seed in range(4)]
        pending = [pool.submit(group) for group in groups]
        for group, rows in zip(groups, pending, strict=True):
            assert torch.equal(rows.wait().rows_RD, expected_rows(group))
