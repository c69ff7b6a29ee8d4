"""Jobs that share a teacher: weights, classes, quotas, and an operator who changes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from kdmesh import errors
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient, TeacherRows
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import RunningTeacher, running_teacher


def ask(client: TeacherClient, num_tokens: int = 9) -> asyncio.Task[TeacherRows]:
    return asyncio.create_task(client.prefill([sequence(num_tokens)], Deadline.after(10)))


async def rest(teacher: RunningTeacher, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.request(method, f"http://{teacher.addresses.rest}{path}", **options)


async def job_state(teacher: RunningTeacher, job: str) -> dict[str, Any]:
    found: dict[str, Any] = (await rest(teacher, f"/v1/jobs/{job}")).json()
    return found


async def until_waiting(teacher: RunningTeacher, count: int) -> None:
    async with asyncio.timeout(5):
        while (await rest(teacher, "/v1/slab")).json()["waiting"]["requests"] != count:
            pass  # each look is a round trip through the server's loop


async def hold_engine(teacher: RunningTeacher, client: TeacherClient) -> asyncio.Task[TeacherRows]:
    """The engine holds the batch of one request, so that whatever comes now waits."""
    teacher.engine.hold()
    held = ask(client, 5)
    await asyncio.to_thread(teacher.engine.wait_entered)
    return held


async def order_of_answers(
    teacher: RunningTeacher, wishes: Sequence[tuple[str, TeacherClient, int]], num_tokens: int
) -> list[str]:
    """Names in the order of their answers, when all that was wished for waits before the first starts."""
    finished: list[str] = []

    async def note(name: str, client: TeacherClient) -> None:
        rows = await ask(client, num_tokens)
        finished.append(name)
        del rows

    held = await hold_engine(teacher, wishes[0][1])
    count = 0
    async with asyncio.TaskGroup() as asking:
        for name, client, requests in wishes:
            for _ in range(requests):
                asking.create_task(note(name, client))
            count += requests
            await until_waiting(teacher, count)
        teacher.engine.let_go()
    await held
    return finished


async def test_weights_divide_the_engine(tmp_path: Path) -> None:
    jobs = {"overrides": {"heavy": {"weight": 3}}}
    async with (
        running_teacher(tmp_path, engine={"max_batch_tokens": 20}, jobs=jobs) as teacher,
        teacher.client(job="light") as light,
        teacher.client(job="heavy") as heavy,
    ):
        order = await order_of_answers(teacher, [("light", light, 8), ("heavy", heavy, 12)], num_tokens=10)
    assert 7 <= order[:12].count("heavy") <= 11  # answers to two clients may overtake each other


async def test_higher_class_is_answered_first(tmp_path: Path) -> None:
    jobs = {"defaults": {"priority": "low"}, "overrides": {"urgent": {"priority": "high"}}}
    async with (
        running_teacher(tmp_path, engine={"max_batch_tokens": 20}, jobs=jobs) as teacher,
        teacher.client(job="patient") as patient,
        teacher.client(job="urgent") as urgent,
    ):
        await order_of_answers(teacher, [("patient", patient, 4), ("urgent", urgent, 4)], num_tokens=18)
        waits = {job: await job_state(teacher, job) for job in ("patient", "urgent")}
    assert waits["urgent"]["wait_p99_s"] < waits["patient"]["wait_p50_s"]  # who came first began last


async def test_job_that_fills_the_queue_shuts_nobody_out(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, queue={"max_tokens": 100}) as teacher,
        teacher.client(job="flood") as flood,
        teacher.client(job="other") as other,
    ):
        held = await hold_engine(teacher, flood)
        waiting = [ask(flood, 50) for _ in range(2)]
        await until_waiting(teacher, 2)
        with pytest.raises(errors.Unavailable, match=r"100 tokens wait, this request has 20, .* 100 of them of job"):
            await ask(flood, 20)
        waiting += [ask(other, 20) for _ in range(2)]
        await until_waiting(teacher, 4)
        with pytest.raises(errors.Unavailable, match="50 of them of job 'other'"):
            await ask(other, 20)
        teacher.engine.let_go()
        await asyncio.gather(held, *waiting)
        assert (await job_state(teacher, "flood"))["refusals"] == {"queue_full": 1}


async def test_tokens_in_flight_bound_a_jobs_part_of_a_batch(tmp_path: Path) -> None:
    jobs = {"overrides": {"bounded": {"max_tokens_in_flight": 30}}}
    async with (
        running_teacher(tmp_path, jobs=jobs) as teacher,
        teacher.client(job="bounded") as bounded,
        teacher.client(job="free") as free,
    ):
        held = await hold_engine(teacher, free)
        waiting = [ask(client, 20) for client in (bounded, bounded, free, free)]
        await until_waiting(teacher, 4)
        large = ask(bounded, 40)  # more than it may have: goes alone
        await until_waiting(teacher, 5)
        teacher.engine.let_go()
        await asyncio.gather(held, large, *waiting)
        assert teacher.engine.batches[-4:] == [1, 3, 1, 1]
        assert (await job_state(teacher, "bounded"))["tokens_in_flight"] == 0


async def test_bytes_in_flight_bound_the_slots_of_all_sessions_of_a_job(tmp_path: Path) -> None:
    jobs = {"overrides": {"bounded": {"max_bytes_in_flight": 2 * 65536}}}
    async with (
        running_teacher(tmp_path, jobs=jobs, queue={"max_wait_s": 0.2}) as teacher,
        teacher.client(job="bounded", door="shm") as one,
        teacher.client(job="bounded", door="shm") as two,
        teacher.client(job="free", door="shm") as free,
    ):
        kept = [await ask(one), await ask(two)]
        with pytest.raises(errors.Unavailable, match="holds 2 slots of 65536 bytes, and may hold 131072 bytes"):
            await ask(one)
        assert (await ask(free)).rows_RD.shape == (8, 8)
        state = await job_state(teacher, "bounded")
        assert (state["sessions"], state["slots"], state["slab_bytes"]) == (2, 2, 131072)
        assert state["refusals"] == {"max_bytes_in_flight": 1}
        kept.pop()  # its slot comes back
        assert (await ask(one)).rows_RD.shape == (8, 8)


async def test_requests_over_the_rate_wait_and_then_are_refused_with_the_wait(tmp_path: Path) -> None:
    jobs = {"defaults": {"max_requests_per_s": 0.05}}
    async with (
        running_teacher(tmp_path, jobs=jobs, queue={"max_wait_s": 0.2}) as teacher,
        teacher.client(job="frequent") as client,
    ):
        await ask(client)
        with pytest.raises(errors.Unavailable, match=r"job 'frequent' may start 0\.05 requests a second") as refused:
            await ask(client)
        assert 15 < refused.value.retry_after_s <= 20


async def test_what_its_rate_holds_back_starts_by_itself(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, jobs={"defaults": {"max_requests_per_s": 5}}) as teacher,
        teacher.client() as client,
    ):
        for _ in range(6):  # the burst, and one more
            assert (await ask(client)).rows_RD.shape == (8, 8)


async def test_operator_changes_the_terms_of_a_running_job(tmp_path: Path) -> None:
    jobs = {"defaults": {"max_requests_per_s": 0.001, "weight": 2}}
    async with running_teacher(tmp_path, jobs=jobs) as teacher, teacher.client(job="a/b") as client:
        await ask(client)
        stuck = ask(client)
        await until_waiting(teacher, 1)
        put = await rest(teacher, "/v1/jobs/a/b", "PUT", json={"max_requests_per_s": None, "priority": "high"})
        assert put.status_code == 200
        assert (await stuck).rows_RD.shape == (8, 8)
        state = await job_state(teacher, "a/b")
        assert state["is_overridden"]
        assert state["terms"] == {
            "weight": 2,
            "priority": "high",
            "max_tokens_in_flight": None,
            "max_requests_per_s": None,
            "max_bytes_in_flight": None,
        }
        assert (state["tokens"], state["share"], state["waiting_requests"]) == (18, 1, 0)
        assert 0 <= state["wait_p50_s"] <= state["wait_p99_s"]
        everything = (await rest(teacher, "/v1/jobs")).json()
        assert [job["job"] for job in everything["jobs"]] == ["a/b"]
        assert everything["defaults"]["max_requests_per_s"] == 0.001
        assert (await rest(teacher, "/v1/jobs/a/b", "DELETE")).json()["terms"]["priority"] == "normal"


@pytest.mark.parametrize(
    ("job", "terms", "sentence"),
    [
        ("job", {"weight": 0}, "weight: Input should be greater than or equal to 0.001 (got 0)"),
        ("job", {"priority": "urgent"}, "(got 'urgent')"),
        ("job", {"max_tokens": 5}, "max_tokens: there is no such key"),
        ("job", {"weight": True}, "weight: give a number (got true)"),
        ("n" * 129, {}, "has 129 characters; it must be of at most 128"),
    ],
)
async def test_bad_terms_are_refused_with_the_value(
    tmp_path: Path, job: str, terms: dict[str, Any], sentence: str
) -> None:
    async with running_teacher(tmp_path) as teacher:
        put = await rest(teacher, f"/v1/jobs/{job}", "PUT", json=terms)
        assert put.status_code == 400
        assert sentence in put.json()["reason"]
        assert (await rest(teacher, "/v1/jobs")).json()["jobs"] == []


@pytest.mark.parametrize("depth", [600, 900])
async def test_terms_in_each_other_are_refused_however_deep(tmp_path: Path, depth: int) -> None:
    async with running_teacher(tmp_path) as teacher:
        deep = f'{{"weight": {"[" * depth}{"]" * depth}}}'
        headers = {"Content-Type": "application/json"}
        put = await rest(teacher, "/v1/jobs/job", "PUT", content=deep, headers=headers)
        assert (put.status_code, put.json()) == (400, {"reason": "weight: give a number (got a list)"})


async def test_terms_that_are_too_long_or_may_be_are_not_read(tmp_path: Path) -> None:
    async def in_parts() -> AsyncIterator[bytes]:
        yield b"{}"

    async with running_teacher(tmp_path) as teacher:
        put = await rest(teacher, "/v1/jobs/job", "PUT", content=b"{" + b" " * 2**20)
        assert (put.status_code, put.json()) == (413, {"reason": "a body of 1048577 bytes; it may have 1048576"})
        put = await rest(teacher, "/v1/jobs/job", "PUT", content=in_parts())
        assert (put.status_code, put.json()) == (411, {"reason": "a body needs a Content-Length"})
        assert (await rest(teacher, "/v1/jobs")).json()["jobs"] == []


async def test_name_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        with pytest.raises(errors.InvalidRequest, match="job's name 'up\\\\ndown' has 7 characters"):
            async with teacher.client(job="up\ndown"):
                pass


async def test_metrics_tell_what_each_job_waits_for_and_holds(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, queue={"max_wait_s": 0.2}, jobs={"defaults": {"max_requests_per_s": 1}}) as teacher,
        teacher.client(job="keeper", door="shm") as client,
    ):
        kept = await ask(client)
        with pytest.raises(errors.Unavailable):
            await ask(client)
        text = (await rest(teacher, "/metrics")).text
        assert 'kdmesh_teacher_job_slab_bytes{kdmesh_job="keeper"} 65536.0' in text
        assert 'kdmesh_teacher_job_leases{kdmesh_job="keeper"} 1.0' in text
        assert 'kdmesh_teacher_job_waiting_tokens{kdmesh_job="keeper"} 0.0' in text
        assert 'kdmesh_teacher_job_refusals_total{kdmesh_job="keeper",reason="max_requests_per_s"} 1.0' in text
        assert 'kdmesh_teacher_tokens_total{kdmesh_job="keeper"} 9.0' in text
        assert 'kdmesh_teacher_queue_seconds_count{kdmesh_job="keeper"} 1.0' in text
        del kept
