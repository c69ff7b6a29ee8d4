"""What comes through the RDMA door is what comes through the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch

from kdmesh.handles.doors.rdma import RdmaDoor
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.doors import DoorChoice
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import running_teacher

pytestmark = pytest.mark.rdma

RDMA = {"rdma": True}


@pytest.mark.parametrize("transports", ["tcp", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_rows_and_head_are_the_same_bits_through_every_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transports: str, dtype: str
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    asked = [sequence(30, seed=1), sequence(2, seed=2), sequence(77, seed=3, every=5)]
    doors: list[DoorChoice] = ["rdma", "shm", "stream"]
    async with running_teacher(tmp_path, engine={"dtype": dtype}, server=RDMA) as teacher:
        seen = []
        for door in doors:
            async with teacher.client(door=door) as client:
                assert client.door.name == door
                rows = (await client.prefill(asked, Deadline.after(10))).rows_RD.clone()
                head, _ = await client.head()
                assert head.bias_V is not None
                seen.append((rows, head.weight_VD.clone(), head.bias_V.clone()))
    assert torch.equal(seen[0][0].float(), expected_rows(asked))
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


async def test_two_clients_with_many_requests_each_get_their_own_rows(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, server=RDMA) as teacher,
        teacher.client(door="rdma") as one,
        teacher.client(door="rdma") as other,
    ):

        async def ask(seed: int) -> None:
            asked = [sequence(2 + seed, seed=seed), sequence(40, seed=seed + 100)]
            rows = await (one if seed % 2 else other).prefill(asked, Deadline.after(20))
            assert torch.equal(rows.rows_RD, expected_rows(asked))
            assert not rows.is_borrowed

        async with asyncio.TaskGroup() as asking:
            for seed in range(40):
                asking.create_task(ask(seed))


async def test_auto_prefers_shared_memory_and_then_rdma(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, server=RDMA) as teacher:
        async with teacher.client(door="auto") as client:
            assert client.door.name == "shm"
        (tmp_path / f"teacher-{teacher.addresses.grpc.rpartition(':')[2]}.sock").rename(tmp_path / "elsewhere")
        async with teacher.client(door="auto") as client:
            assert client.door.name == "rdma"


async def test_bytes_that_were_read_are_counted(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, server=RDMA) as teacher, teacher.client(door="rdma") as client:
        await client.prefill([sequence(30)], Deadline.after(10))
        async with httpx.AsyncClient() as rest:
            shown = (await rest.get(f"http://{teacher.addresses.rest}/metrics")).text
        assert f'kdmesh_teacher_bytes_total{{door="rdma"}} {float(29 * 8 * 4)}' in shown


async def test_no_job_is_told_of_memory_that_another_was_told_of(tmp_path: Path) -> None:
    slab = {"slots": 2, "slots_per_session": 2}
    async with (
        running_teacher(tmp_path, server=RDMA, slab=slab) as teacher,
        teacher.client(job="one", door="rdma") as one,
        teacher.client(job="other", door="rdma") as other,
    ):
        for seed in range(6):  # in turn, so that each needs the slots that the other had
            for client in (one, other):
                asked = [[sequence(9, seed=seed)], [sequence(30, seed=seed)]]
                rows = await asyncio.gather(*(client.prefill(group, Deadline.after(20)) for group in asked))
                for group, came in zip(asked, rows, strict=True):
                    assert torch.equal(came.rows_RD, expected_rows(group))
        assert isinstance(one.door, RdmaDoor) and isinstance(other.door, RdmaDoor)
        places = [{(segment, epoch) for segment, (epoch, _) in door._known.items()} for door in (one.door, other.door)]
        assert not places[0] & places[1]
        assert max(epoch for _, epoch in places[1]) > 1
