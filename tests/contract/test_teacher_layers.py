"""Outputs of a teacher's layers, behind the final hidden state in every row."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmesh import errors
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import num_waiting, running_teacher

LAYERED: dict[str, Any] = {"num_layers": 5}
BOTH_DOORS = pytest.mark.parametrize("door", ["shm", "stream"])


@BOTH_DOORS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_each_request_gets_the_layers_that_it_asked_for_also_in_one_batch(
    tmp_path: Path, door: DoorChoice, dtype: str
) -> None:
    async with (
        running_teacher(tmp_path, engine={**LAYERED, "dtype": dtype}) as teacher,
        teacher.client(door=door) as client,
    ):
        assert client.model.num_layers == 5

        async def ask(seed: int, layers: tuple[int, ...]) -> None:
            asked = [sequence(9 + seed, seed=seed), sequence(20, seed=seed + 50, every=3)]
            rows = await client.prefill(asked, Deadline.after(10), layers=layers)
            assert rows.rows_RD.shape == (sum(s.num_rows for s in asked), 8 * (1 + len(layers)))
            assert torch.equal(rows.rows_RD.float(), expected_rows(asked, layers=layers))

        teacher.engine.batches.clear()
        teacher.engine.hold()
        async with asyncio.TaskGroup() as asking:
            for seed, layers in enumerate([(), (2,), (1, 5), (), (1, 2, 3, 4, 5), (2,)]):
                asking.create_task(ask(seed, layers))
            await asyncio.to_thread(teacher.engine.wait_entered)
            while await num_waiting(teacher) < 2:  # all others have one of the four slots
                pass
            teacher.engine.let_go()
        assert sum(teacher.engine.batches) == 6
        assert max(teacher.engine.batches) > 1


@BOTH_DOORS
def test_a_group_of_wider_rows_is_asked_for_in_more_parts(tmp_path: Path, door: DoorChoice) -> None:
    async def answered(layers: tuple[int, ...]) -> int:
        # 128 rows of final hidden states fit in a slot.
        slab = {"slot_mib": 128 * 32 / 2**20}
        async with running_teacher(tmp_path, engine=LAYERED, slab=slab) as teacher:
            return await asyncio.to_thread(rows_of, teacher.addresses.grpc, layers)

    def rows_of(address: str, layers: tuple[int, ...]) -> int:
        group = [sequence(30, seed=seed) for seed in range(8)]
        with TeacherPool([address], job="test", door=door, deadline_s=10, layers=layers) as pool:
            assert pool.row_bytes() == 32 * (1 + len(layers))
            assert pool.describe().max_request_rows == 128 // (1 + len(layers))
            assert torch.equal(pool.submit(group).wait().rows_RD, expected_rows(group, layers=layers))
            requests = pool.stats().requests
            assert torch.equal(pool.submit(group, has_layers=False).wait().rows_RD, expected_rows(group))
            with pytest.raises(errors.InvalidRequest, match=r"asks for 129 rows; .*raise its slab\.slot_mib"):
                pool.submit([sequence(130)])
            for has_layers in (True, False):
                rows = pool.submit(group, has_layers=has_layers).wait()
                blank = pool.blank_rows(5, has_layers=has_layers)
                assert blank.rows_RD.shape == (5, rows.rows_RD.shape[1]) and blank.rows_RD.dtype == rows.rows_RD.dtype
                assert blank.weight_version == rows.weight_version and not blank.rows_RD.any()
            return requests

    assert asyncio.run(answered(())) == 2
    assert asyncio.run(answered((1, 4))) == 8


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ((0,), "layer 0; the model has layers 1 to 5"),
        ((2, 6), "layer 6; the model has layers 1 to 5"),
        ((3, 2), r"layers \[3, 2\], which must be ascending"),
        ((1,) * 1_000_000, "the request is for 1000000 layers; the model has 5"),
        ((2, 2), r"layers \[2, 2\], which must be ascending"),
    ],
)
async def test_layers_that_are_none_are_refused_before_any_work(
    tmp_path: Path, layers: tuple[int, ...], sentence: str
) -> None:
    async with running_teacher(tmp_path, engine=LAYERED) as teacher, teacher.client() as client:
        teacher.engine.batches.clear()
        with pytest.raises(errors.InvalidRequest, match=sentence):
            await client.prefill([sequence(9)], Deadline.after(5), layers=layers)
        with pytest.raises(errors.InvalidRequest, match=sentence):
            await client.find_cached([sequence(9)], layers=layers, weight_version=1)
        assert not teacher.engine.batches


async def test_more_rows_than_fit_with_their_layers_are_refused(tmp_path: Path) -> None:
    slab = {"slot_mib": 128 * 32 / 2**20}
    async with running_teacher(tmp_path, engine=LAYERED, slab=slab) as teacher, teacher.client() as client:
        asked = [sequence(65), sequence(65, seed=1)]
        assert (await client.prefill(asked, Deadline.after(5))).rows_RD.shape == (128, 8)
        with pytest.raises(errors.InvalidRequest, match="128 rows over all its sequences; the most allowed is 64"):
            await client.prefill(asked, Deadline.after(5), layers=[3])


async def test_a_server_that_gives_none_is_refused_with_a_sentence(tmp_path: Path) -> None:
    def opened(address: str, layers: tuple[int, ...]) -> None:
        TeacherPool([address], job="test", door="stream", deadline_s=10, layers=layers).close()

    async with running_teacher(tmp_path) as teacher:
        with pytest.raises(errors.ModelMismatch, match=r"final hidden states alone.*its layers \[1, 3\]: that needs"):
            await asyncio.to_thread(opened, teacher.addresses.grpc, (1, 3))
        async with teacher.client() as client:
            with pytest.raises(errors.InvalidRequest, match="teacher fake gives final hidden states alone"):
                await client.prefill([sequence(9)], Deadline.after(5), layers=[1])
    async with running_teacher(tmp_path, engine=LAYERED) as teacher:
        with pytest.raises(errors.ModelMismatch, match="output of layer 6 of teacher fake, which has layers 1 to 5"):
            await asyncio.to_thread(opened, teacher.addresses.grpc, (1, 6))
        await asyncio.to_thread(opened, teacher.addresses.grpc, (1, 5))


@pytest.mark.parametrize("place", ["memory", "directory"])
async def test_rows_are_kept_for_one_choice_of_layers(tmp_path: Path, place: str) -> None:
    kept = {"memory_mib": 1} if place == "memory" else {"directory": str(tmp_path / "cache"), "directory_mib": 1}
    asked = [sequence(30, seed=seed) for seed in range(3)]
    choices: list[tuple[int, ...]] = [(), (1,), (2,), (1, 2)]
    async with running_teacher(tmp_path, engine=LAYERED, cache=kept) as teacher, teacher.client() as client:
        for layers in choices:
            teacher.engine.batches.clear()
            found = await client.find_cached(asked, layers=layers, weight_version=1)
            assert found.is_kept == (False,) * 3
            for part in (asked[1:2], asked, asked):
                rows = await client.prefill(part, Deadline.after(10), layers=layers)
                assert torch.equal(rows.rows_RD, expected_rows(part, layers=layers))
                await until_kept(client, part, layers)
            assert teacher.engine.batches == [1, 2]  # what comes before and after the one that is kept


async def until_kept(client: Any, asked: list[Any], layers: tuple[int, ...]) -> None:
    async with asyncio.timeout(10):
        while not all((await client.find_cached(asked, layers=layers, weight_version=1)).is_kept):
            pass
