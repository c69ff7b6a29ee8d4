"""A teacher whose weights are replaced: body and head change together, and what was answered stays."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from torch import Tensor

from kdmesh import errors
from kdmesh.rpc import codec
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.rpc.weights.services import TEACHERS
from kdmesh.types import DType, SleepTag
from kdmesh.v1 import teacher_pb2
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherStub
from kdmesh.weights.doors import DoorChoice as WeightDoor
from kdmesh.weights.manifest import TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Weights
from tests.support.teacher_process import teacher_process
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher
from tests.support.weight_server import ROOT

BOTH_DOORS = pytest.mark.parametrize("door", ["shm", "stream"])
FINGERPRINT = "fa4e000000080000003c"
HEAD_BYTES = 2 * 4096  # the weight's page, and the bias's


def factors(version: int) -> Tensor:
    """[D] of a version; powers of two, so that rows are exact."""
    return 2.0 ** ((torch.arange(8) + version) % 5 - 2)


def head_of(version: int) -> Tensor:
    """[V, D]."""
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(version))


def weights(version: int) -> Weights:
    return [
        (TensorSpec(name="trunk", shape=(8,), dtype=DType.FLOAT32), lambda: factors(version)),
        (TensorSpec(name="head", shape=(64, 8), dtype=DType.FLOAT32), lambda: head_of(version)),
    ]


@asynccontextmanager
async def updatable(directory: Path, **sections: dict[str, Any]) -> AsyncIterator[RunningTeacher]:
    async with running_teacher(directory, **sections | {"engine": {"updatable": True}}) as teacher:
        yield teacher


async def publish(
    teacher: RunningTeacher,
    version: int,
    policy: UpdatePolicy = UpdatePolicy.FINISH,
    *,
    deadline_s: float = 20,
    door: WeightDoor = "auto",
) -> None:
    def send() -> None:
        with WeightSender(
            [teacher.addresses.grpc], service=TEACHERS, bucket_bytes=2**12, deadline_s=deadline_s, door=door
        ) as sender:
            sender.publish(version, FINGERPRINT, weights(version), policy)

    await asyncio.to_thread(send)


async def rows_of(client: TeacherClient, *, version: int = 0) -> tuple[Tensor, int]:
    rows = await client.prefill([sequence(30)], Deadline.after(10), weight_version=version)
    return rows.rows_RD, rows.weight_version


async def shared_bytes(teacher: RunningTeacher) -> int:
    async with httpx.AsyncClient() as http:
        slab = (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()
    assert isinstance(slab["shared_bytes"], int)
    return slab["shared_bytes"]


def first_head(teacher: RunningTeacher) -> Tensor:
    return torch.frombuffer(bytearray(teacher.engine.head_parts().weight), dtype=torch.float32).view(64, 8)


@BOTH_DOORS
async def test_rows_head_and_version_are_all_those_of_the_new_weights(tmp_path: Path, door: DoorChoice) -> None:
    async with updatable(tmp_path) as teacher, teacher.client(door=door) as client:
        assert client.model.model_fingerprint == client.model.architecture_fingerprint == FINGERPRINT
        for version in (2, 5):
            await publish(teacher, version)
            rows_RD, made_by = await rows_of(client)
            assert torch.equal(rows_RD, expected_rows([sequence(30)]) * factors(version))
            head, belongs_to = await client.head()
            assert torch.equal(head.weight_VD, head_of(version))
            assert head.bias_V is not None and torch.equal(head.bias_V, head_of(version)[:, 0] * 0.5)
            async with teacher.client() as other:
                assert made_by == belongs_to == other.model.weight_version == version
        del head
        assert await shared_bytes(teacher) == HEAD_BYTES  # old heads are gone


@pytest.mark.parametrize("door", ["shm", "collective", "inline"])
async def test_new_weights_come_through_every_door(tmp_path: Path, door: WeightDoor) -> None:
    async with updatable(tmp_path) as teacher, teacher.client() as client:
        await publish(teacher, 2, door=door)
        rows_RD, version = await rows_of(client)
        assert version == 2 and torch.equal(rows_RD, expected_rows([sequence(30)]) * factors(2))


@BOTH_DOORS
async def test_what_was_answered_before_an_update_stays_readable_after_it(tmp_path: Path, door: DoorChoice) -> None:
    async with updatable(tmp_path) as teacher, teacher.client(door=door) as client:
        first = first_head(teacher).clone()
        answer = await told_head(client)
        rows_RD, _ = await rows_of(client)
        await publish(teacher, 2)
        assert await shared_bytes(teacher) == 2 * HEAD_BYTES
        # Neither was read yet, nor mapped.
        old_VD = await client.door.fetch(codec.handle_from_wire(answer.weight))
        assert torch.equal(old_VD, first)
        assert torch.equal(rows_RD, expected_rows([sequence(30)]))
        old_bias_1V = await client.door.fetch(codec.handle_from_wire(answer.bias))
        assert torch.equal(old_bias_1V[0], first[:, 0] * 0.5)
        head, version = await client.head()
        assert version == 2 and torch.equal(head.weight_VD, head_of(2))
        assert await shared_bytes(teacher) == HEAD_BYTES
        assert torch.equal(old_VD, first)  # who has it keeps it
        with pytest.raises(errors.HandleGone):
            await client.door.fetch(codec.handle_from_wire(answer.weight))


async def test_an_old_head_goes_with_the_session_that_holds_it(tmp_path: Path) -> None:
    async with updatable(tmp_path) as teacher:
        async with teacher.client() as holder:
            await told_head(holder)
            for version in (2, 3, 4):
                await publish(teacher, version)
            assert await shared_bytes(teacher) == 2 * HEAD_BYTES  # the first one and the last
        assert await shared_bytes(teacher) == HEAD_BYTES


async def test_a_batch_under_way_ends_on_the_old_weights_and_what_waits_gets_the_new(tmp_path: Path) -> None:
    async with updatable(tmp_path) as teacher, teacher.client() as client:
        teacher.engine.hold()
        running = asyncio.create_task(rows_of(client, version=1))
        await asyncio.to_thread(teacher.engine.wait_entered)
        publishing = asyncio.create_task(publish(teacher, 2))
        await until_verified(teacher)
        waiting = asyncio.create_task(rows_of(client))
        refused = asyncio.create_task(rows_of(client, version=1))
        await until_waiting(teacher, 2)
        teacher.engine.let_go()
        rows_RD, version = await running
        assert version == 1 and torch.equal(rows_RD, expected_rows([sequence(30)]))
        await publishing
        rows_RD, version = await waiting
        assert version == 2 and torch.equal(rows_RD, expected_rows([sequence(30)]) * factors(2))
        with pytest.raises(errors.ModelMismatch, match="for weight version 1; this server has 2"):
            await refused
        with pytest.raises(errors.ModelMismatch, match="for weight version 3; this server has 2"):
            await rows_of(client, version=3)


async def test_rows_are_always_those_of_the_version_they_name(tmp_path: Path) -> None:
    async with updatable(tmp_path) as teacher, teacher.client(door="shm") as client:
        seen = set()
        is_over = asyncio.Event()

        async def ask() -> None:
            while not is_over.is_set():
                rows_RD, version = await rows_of(client)
                expected = expected_rows([sequence(30)]) * (factors(version) if version > 1 else 1)
                assert torch.equal(rows_RD, expected), version
                del rows_RD  # there are fewer slots than tasks
                seen.add(version)

        async with asyncio.TaskGroup() as asking:
            for _ in range(6):
                asking.create_task(ask())
            for version in range(2, 12):
                await publish(teacher, version)
            is_over.set()
        assert len(seen) > 5


async def test_an_update_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    async with updatable(tmp_path) as teacher, teacher.client() as client:
        await publish(teacher, 2)
        specs = [pb.TensorSpec(name=s.name, shape=s.shape, dtype=codec.DTYPES.to_wire(s.dtype)) for s, _ in weights(3)]
        begin = pb.BeginUpdate(version=3, architecture_fingerprint=FINGERPRINT, tensors=specs, policy=1)
        async with grpc.aio.insecure_channel(teacher.addresses.grpc) as channel:
            call = TeacherStub(channel).UpdateWeights()
            await call.write(pb.UpdateWeightsRequest(begin=begin))
            assert (await call.read()).weight_version == 2  # type: ignore[union-attr]
            assert await weights_state(teacher) == "receiving"
            second = TeacherStub(channel).UpdateWeights()
            await second.write(pb.UpdateWeightsRequest(begin=begin))
            with pytest.raises(grpc.aio.AioRpcError, match="the update to version 3 is under way"):
                await second.read()
            call.cancel()
        async with asyncio.timeout(10):
            while await weights_state(teacher) != "serving":
                pass
        rows_RD, version = await rows_of(client)
        assert version == 2 and torch.equal(rows_RD, expected_rows([sequence(30)]) * factors(2))
        assert await shared_bytes(teacher) == HEAD_BYTES
        await publish(teacher, 3)
        assert (await rows_of(client))[1] == 3


def test_a_sender_that_is_killed_changes_nothing(tmp_path: Path) -> None:
    shapes = json.dumps({"trunk": [8], "head": [64, 8]})
    with teacher_process(tmp_path, engine={"updatable": True}) as teacher:
        arguments = [teacher.grpc, shapes, "2", "60", "auto", FINGERPRINT]
        command = [sys.executable, "-m", "tests.support.weight_sender_process", *arguments]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as killed:
            assert killed.stdout is not None
            assert killed.stdout.readline() == "trunk\n"
            assert teacher.get("/v1/weights") == {"version": 1, "state": "receiving"}
            killed.kill()
        while teacher.get("/v1/weights") != {"version": 1, "state": "serving"}:
            pass  # each look is a round trip
        with TeacherPool([teacher.grpc], job="test", deadline_s=10) as pool:
            assert torch.equal(pool.submit([sequence(30)]).wait().rows_RD, expected_rows([sequence(30)]))
            assert pool.head()[1] == 1


async def test_a_teacher_whose_weights_sleep_takes_no_others_and_does_when_it_wakes(tmp_path: Path) -> None:
    async with updatable(tmp_path) as teacher, teacher.client() as client:
        await client.sleep({SleepTag.WEIGHTS}, drain_s=5)
        async with grpc.aio.insecure_channel(teacher.addresses.grpc) as channel:
            refused = TeacherStub(channel).UpdateWeights()
            assert await refused.code() is grpc.StatusCode.UNAVAILABLE
            assert "the server sleeps (weights given back)" in await refused.details()
        await client.wake({SleepTag.WEIGHTS})
        await publish(teacher, 2)
        assert (await rows_of(client))[1] == 2


async def test_an_update_that_is_received_is_finished_before_sleep(tmp_path: Path) -> None:
    async with updatable(tmp_path) as teacher, teacher.client() as client:
        teacher.engine.hold()
        running = asyncio.create_task(rows_of(client))
        await asyncio.to_thread(teacher.engine.wait_entered)
        publishing = asyncio.create_task(publish(teacher, 2))
        await until_verified(teacher)
        sleeping = asyncio.create_task(client.sleep({SleepTag.WEIGHTS}, drain_s=20))
        teacher.engine.let_go()
        await asyncio.gather(running, publishing, sleeping)
        await client.wake({SleepTag.WEIGHTS})
        rows_RD, version = await rows_of(client)
        assert version == 2 and torch.equal(rows_RD, expected_rows([sequence(30)]) * factors(2))


async def test_a_frozen_teacher_refuses_new_weights(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        assert client.model.architecture_fingerprint == ""
        with pytest.raises(errors.ModelMismatch, match=r"the weights of teacher fake are frozen: .*engine\.updatable"):
            await publish(teacher, 2)


async def test_another_policy_than_finish_is_refused(tmp_path: Path) -> None:
    async with updatable(tmp_path) as teacher:
        with pytest.raises(errors.InvalidRequest, match="update policy abort; this server knows finish"):
            await publish(teacher, 2, UpdatePolicy.ABORT)


@pytest.mark.parametrize("failure", [RuntimeError("half of it is copied"), errors.EngineFailure("SGLang refuses")])
async def test_weights_that_cannot_be_taken_over_end_the_server(tmp_path: Path, failure: Exception) -> None:
    async with updatable(tmp_path) as teacher, teacher.client() as client:

        def broken(version: int) -> None:
            raise failure

        teacher.engine.commit = broken  # type: ignore[method-assign]
        with pytest.raises((errors.DeadlineExpired, errors.EngineFailure)):
            await publish(teacher, 2, deadline_s=1)
        with pytest.raises(errors.EngineFailure, match="new weights could not be taken over"):
            await teacher.ended
        with pytest.raises(errors.RpcError):
            await rows_of(client)


async def told_head(client: TeacherClient) -> teacher_pb2.GetHeadResponse:
    """The handles, not fetched."""
    return await client._stub.GetHead(teacher_pb2.GetHeadRequest(session=client._session))


async def until_verified(teacher: RunningTeacher) -> None:
    async with asyncio.timeout(10):
        while await weights_state(teacher) != "verified":
            pass  # each look is a round trip through the server's loop


async def until_waiting(teacher: RunningTeacher, requests: int) -> None:
    async with asyncio.timeout(10), httpx.AsyncClient() as http:
        while (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()["waiting"]["requests"] < requests:
            pass


async def weights_state(teacher: RunningTeacher) -> str:
    async with httpx.AsyncClient() as http:
        state = (await http.get(f"http://{teacher.addresses.rest}/v1/weights")).json()["state"]
    assert isinstance(state, str)
    return state
