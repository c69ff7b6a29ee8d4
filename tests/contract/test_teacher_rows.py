"""A client gets the rows it asked for, through either door."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kdmesh import errors
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers import raw_chunk, row_chunks
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh_teacher.engine import HeadParts
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import num_waiting, running_teacher

BOTH_DOORS = pytest.mark.parametrize("door", ["shm", "stream"])


@BOTH_DOORS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_rows_are_those_of_the_engine(tmp_path: Path, door: DoorChoice, dtype: str) -> None:
    async with running_teacher(tmp_path, engine={"dtype": dtype}) as teacher, teacher.client(door=door) as client:
        asked = [sequence(30, seed=1), sequence(2, seed=2), sequence(77, seed=3, every=5)]
        rows = await client.prefill(asked, Deadline.after(10))
        assert rows.rows_RD.dtype is getattr(torch, dtype)
        assert torch.equal(rows.rows_RD.float(), expected_rows(asked))
        assert rows.weight_version == client.model.weight_version == 1
        assert rows.is_borrowed is (door == "shm")


@BOTH_DOORS
async def test_many_requests_at_once_each_get_their_own_rows(tmp_path: Path, door: DoorChoice) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client(door=door) as client:

        async def ask(seed: int) -> None:
            asked = [sequence(2 + seed, seed=seed), sequence(40, seed=seed + 100)]
            rows = await client.prefill(asked, Deadline.after(10))
            assert torch.equal(rows.rows_RD, expected_rows(asked))

        teacher.engine.batches.clear()
        teacher.engine.hold()
        async with asyncio.TaskGroup() as asking:
            for seed in range(40):
                asking.create_task(ask(seed))
            await asyncio.to_thread(teacher.engine.wait_entered)
            while await num_waiting(teacher) < 2:
                pass
            teacher.engine.let_go()
        assert sum(teacher.engine.batches) == 40
        assert max(teacher.engine.batches) > 1


@BOTH_DOORS
async def test_head_is_that_of_the_engine(tmp_path: Path, door: DoorChoice) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client(door=door) as client:
        head, version = await client.head()
        parts: HeadParts = teacher.engine.head_parts()
        assert parts.bias is not None
        assert head.weight_VD.shape == (64, 8)  # padded from 60
        assert torch.equal(head.weight_VD.reshape(-1), torch.frombuffer(bytearray(parts.weight), dtype=torch.float32))
        assert head.bias_V is not None
        assert torch.equal(head.bias_V, torch.frombuffer(bytearray(parts.bias), dtype=torch.float32))
        assert (head.logit_scale, head.logit_softcap, version) == (0.5, 30.0, 1)


async def test_rows_that_change_on_the_way_are_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, sent = raw_chunk.encode, list[int]()

    def spoil_first(data: memoryview, *, offset_bytes: int) -> bytes:
        message = bytearray(encode(data, offset_bytes=offset_bytes))
        message[len(message) // 2] ^= not sent
        sent.append(len(data))
        return bytes(message)

    monkeypatch.setattr(raw_chunk, "encode", spoil_first)
    asked = [sequence(30, seed=1)]

    def ask(address: str) -> tuple[torch.Tensor, int]:
        with TeacherPool([address], job="test", door="stream", deadline_s=10) as pool:
            return pool.submit(asked).wait().rows_RD, pool.stats().retries

    async with running_teacher(tmp_path) as teacher:
        rows_RD, retries = await asyncio.to_thread(ask, teacher.addresses.grpc)
    assert torch.equal(rows_RD, expected_rows(asked))
    assert (retries, len(sent)) == (1, 2)


async def test_fp8_rounds_the_rows_of_a_stream_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_chunks, "GOOD_BYTES", 1000)  # many chunks
    asked = [sequence(250, seed=1)]

    async def ask(address: str, door: DoorChoice) -> tuple[str, torch.Tensor, torch.Tensor]:
        client = await TeacherClient.connect(address, SessionOptions(job="test", door=door, wire="fp8"))
        try:
            rows = await client.prefill(asked, Deadline.after(10))
            return client.door.name, rows.rows_RD, (await client.head())[0].weight_VD
        finally:
            await client.close()

    async with running_teacher(tmp_path, engine={"hidden_size": 50, "dtype": "bfloat16"}) as teacher:
        name, rows_RD, streamed_VD = await ask(teacher.addresses.grpc, "stream")
        near_name, near_RD, weight_VD = await ask(teacher.addresses.grpc, "auto")
    assert (name, near_name) == ("stream_fp8", "shm")
    assert torch.equal(streamed_VD, weight_VD)
    exact_RD = expected_rows(asked, 50)
    assert rows_RD.dtype is torch.bfloat16 and torch.equal(near_RD, exact_RD.to(torch.bfloat16))
    error_RD = (rows_RD.float() - exact_RD).abs()
    assert float(error_RD.max()) > 0 and (error_RD <= exact_RD.abs() / 15 + exact_RD.abs().max() / 450_000).all()


async def test_auto_takes_shared_memory_on_the_same_node(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client(door="auto") as client:
        assert client.door.name == "shm"


async def test_model_is_described_with_its_limits(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        model = client.model
        assert (model.name, model.hidden_size, model.head.vocabulary_size) == ("fake", 8, 60)
        assert model.max_request_tokens == 256
        assert model.max_request_rows == 65536 // 32


async def test_service_is_healthy_and_listed_by_reflection(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        async with grpc.aio.insecure_channel(teacher.addresses.grpc) as channel:
            for name in ("", "kdmesh.v1.Teacher"):
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING

        def listed() -> list[str]:
            with grpc.insecure_channel(teacher.addresses.grpc) as channel:
                return list(ProtoReflectionDescriptorDatabase(channel).get_services())

        assert "kdmesh.v1.Teacher" in await asyncio.to_thread(listed)


async def test_server_that_loads_is_unavailable_and_not_healthy(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, wait_ready=False, held=True) as teacher:
        with pytest.raises(errors.Unavailable, match="loading the model") as refused:
            async with teacher.client():
                pass
        assert refused.value.retry_after_s == 1.0
        async with grpc.aio.insecure_channel(teacher.addresses.grpc) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
