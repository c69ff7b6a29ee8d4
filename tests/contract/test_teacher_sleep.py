"""A teacher that sleeps refuses at once and says why, keeps what it promised, and comes back."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import httpx
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kdmesh import errors
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import EVERY_TAG, SleepTag
from kdmesh.v1 import common_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherStub
from tests.support.teacher_process import teacher_process
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher

ASLEEP = "the server sleeps (weights, kv_cache given back); wake it"


async def is_healthy(teacher: RunningTeacher) -> bool:
    channel = open_channel(teacher.addresses.grpc)
    try:
        request = health_pb2.HealthCheckRequest(service="kdmesh.v1.Teacher")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    finally:
        await channel.close()


async def test_a_sleeping_teacher_refuses_at_once_with_the_reason_and_answers_when_woken(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client, httpx.AsyncClient() as http:
        base = f"http://{teacher.addresses.rest}"
        await client.sleep(EVERY_TAG, drain_s=5)
        await client.sleep(EVERY_TAG, drain_s=5)
        with pytest.raises(errors.Unavailable) as refusal:
            await client.prefill([sequence(9)], Deadline.after(10))
        assert str(refusal.value) == ASLEEP
        assert refusal.value.retry_after_s == 1.0
        ready = await http.get(f"{base}/readyz")
        assert (ready.status_code, ready.json()) == (503, {"reason": ASLEEP})
        for path in ("healthz", "reachz"):
            assert (await http.get(f"{base}/{path}")).status_code == 200
        assert not await is_healthy(teacher)
        async with teacher.client() as other:  # whoever wakes it must be able to connect
            await other.wake(frozenset({SleepTag.WEIGHTS}))
            with pytest.raises(errors.Unavailable, match=r"sleeps \(kv_cache given back\)"):
                await client.prefill([sequence(9)], Deadline.after(10))
            await other.wake(EVERY_TAG)
        assert torch.equal(
            (await client.prefill([sequence(9)], Deadline.after(10))).rows_RD, expected_rows([sequence(9)])
        )
        assert (await http.get(f"{base}/readyz")).status_code == 200
        assert await is_healthy(teacher)


async def test_what_runs_is_finished_before_sleep_and_what_waits_is_refused(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client, httpx.AsyncClient() as http:
        teacher.engine.hold()
        running = asyncio.create_task(client.prefill([sequence(9)], Deadline.after(10)))
        await asyncio.to_thread(teacher.engine.wait_entered)
        waiting = asyncio.create_task(client.prefill([sequence(7)], Deadline.after(10)))
        slab = f"http://{teacher.addresses.rest}/v1/slab"
        while (await http.get(slab)).json()["waiting"]["requests"] < 1:
            pass
        sleeping = asyncio.create_task(client.sleep(EVERY_TAG, drain_s=5))
        with pytest.raises(errors.Unavailable, match="goes to sleep"):
            await waiting
        with pytest.raises(errors.Unavailable, match="goes to sleep"):
            await client.prefill([sequence(8)], Deadline.after(10))
        assert not sleeping.done()
        teacher.engine.let_go()
        assert torch.equal((await running).rows_RD, expected_rows([sequence(9)]))
        await sleeping
        assert teacher.engine.batches[-1] == 1


async def test_a_batch_that_takes_too_long_keeps_the_teacher_awake(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        teacher.engine.hold()
        running = asyncio.create_task(client.prefill([sequence(9)], Deadline.after(10)))
        await asyncio.to_thread(teacher.engine.wait_entered)
        with pytest.raises(errors.DeadlineExpired, match=r"did not finish within 0\.05 s"):
            await client.sleep(EVERY_TAG, drain_s=0.05)
        teacher.engine.let_go()
        assert torch.equal((await running).rows_RD, expected_rows([sequence(9)]))
        assert torch.equal(
            (await client.prefill([sequence(8)], Deadline.after(10))).rows_RD, expected_rows([sequence(8)])
        )


async def test_handles_and_the_head_can_be_read_while_the_teacher_sleeps(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client(door="shm") as client:
        rows = await client.prefill([sequence(9)], Deadline.after(10))
        await client.sleep(EVERY_TAG, drain_s=5)
        head, version = await client.head()
        assert (head.vocabulary_size, version) == (64, 1)
        assert torch.equal(rows.rows_RD, expected_rows([sequence(9)]))
        async with teacher.client(door="stream") as other:
            assert torch.equal((await other.head())[0].weight_VD, head.weight_VD)


@pytest.mark.parametrize(("tags", "says"), [([], "no tag"), ([0], "unknown sleep tag 0"), ([9], "unknown sleep tag 9")])
async def test_tags_that_are_none_are_refused(tmp_path: Path, tags: list[int], says: str) -> None:
    async with running_teacher(tmp_path) as teacher:
        channel = open_channel(teacher.addresses.grpc)
        for method, request in (
            (TeacherStub(channel).Sleep, pb.SleepRequest(tags=tags)),  # type: ignore[arg-type]
            (TeacherStub(channel).Wake, pb.WakeRequest(tags=tags)),  # type: ignore[arg-type]
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=says) as refusal:
                await method(request)  # type: ignore[misc]
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await channel.close()


async def test_an_engine_that_cannot_sleep_says_so_and_works_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        monkeypatch.setattr(type(teacher.engine), "sleep_refusal", "it has no bed")
        with pytest.raises(errors.InvalidRequest, match="it has no bed"):
            await client.sleep(EVERY_TAG, drain_s=5)
        await client.prefill([sequence(9)], Deadline.after(10))


async def test_memory_that_is_not_there_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        await client.sleep(EVERY_TAG, drain_s=5)

        def fail(*_: object) -> None:
            raise errors.Unavailable("the weights cannot come back: no memory")

        with monkeypatch.context() as patched:
            patched.setattr(teacher.engine, "wake", fail)
            with pytest.raises(errors.Unavailable, match="no memory"):
                await client.wake(EVERY_TAG)
        with pytest.raises(errors.Unavailable, match="the server sleeps"):
            await client.prefill([sequence(9)], Deadline.after(10))
        await client.wake(EVERY_TAG)
        await client.prefill([sequence(9)], Deadline.after(10))


async def test_operators_sleep_and_wake_over_http(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, httpx.AsyncClient() as http:
        base = f"http://{teacher.addresses.rest}/v1"
        answer = await http.post(f"{base}/sleep", json={"tags": ["kv_cache", "weights"], "drain_s": 5})
        assert (answer.status_code, answer.json()) == (200, {"asleep": ["kv_cache", "weights"]})
        answer = await http.post(f"{base}/wake", json={"tags": ["weights"]})
        assert answer.json() == {"asleep": ["kv_cache"]}
        told = (await http.get(f"http://{teacher.addresses.rest}/metrics")).text
        assert 'kdmesh_teacher_asleep{tag="weights"} 0.0' in told
        assert 'kdmesh_teacher_asleep{tag="kv_cache"} 1.0' in told
        answer = await http.post(f"{base}/wake", json={"tags": ["kv_cache"]})
        assert answer.json() == {"asleep": []}
        answer = await http.post(f"{base}/sleep", json={"tags": []})
        assert (answer.status_code, answer.json()) == (
            400,
            {"reason": "no tag; name at least one of weights, kv_cache"},
        )
        assert (await http.post(f"{base}/sleep", json={"tags": ["bed"]})).status_code == 422
        for given in ('{"tags": ["weights"], "drain_s": NaN}', '{"tags": [1e999]}', '{"tags": ["\\ud800"]}'):
            answer = await http.post(f"{base}/sleep", content=given, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422, given


def test_a_pool_puts_its_teachers_to_sleep_and_one_that_sleeps_when_it_comes_is_woken(tmp_path: Path) -> None:
    with teacher_process(tmp_path) as running, TeacherPool([running.grpc], job="a", deadline_s=10) as pool:
        pool.sleep()
        assert running.get("/readyz") == {"reason": ASLEEP}
        with TeacherPool([running.grpc], job="b", deadline_s=10) as later:  # as a run after one that was killed
            pending = later.submit([sequence(9)])
            later.wake()
            assert torch.equal(pending.wait().rows_RD, expected_rows([sequence(9)]))
        running.signal(signal.SIGTERM)
        assert running.process.wait(10) == 0


def test_sigterm_ends_a_sleeping_teacher_at_once(tmp_path: Path) -> None:
    with teacher_process(tmp_path) as running, TeacherPool([running.grpc], job="a", deadline_s=10) as pool:
        pool.sleep()
        running.signal(signal.SIGTERM)
        assert running.process.wait(10) == 0
