"""A teacher process starts, drains and ends as it should, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from kdmesh import errors
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.teacher_process import (
    TeacherProcess,
    await_ready,
    starting,
    teacher_process,
    wait_event,
)
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import running_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with teacher_process(tmp_path_factory.mktemp("teacher")) as running:
        yield running


def test_sigterm_finishes_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    ready_file, runtime_dir = tmp_path / "ready.json", tmp_path / "run"
    keys = {"engine": {"seconds_per_batch": 0.15}, "server": {"runtime_dir": str(runtime_dir)}}
    with starting(tmp_path, "--ready-file", str(ready_file), **keys) as process:
        running = await_ready(process)
        assert json.loads(ready_file.read_text()) == {"grpc": running.grpc, "rest": running.rest, "pid": process.pid}
        assert list(runtime_dir.iterdir())
        with TeacherPool([running.grpc], job="test", deadline_s=10) as pool:
            # Two batches: one runs and one waits when the signal comes.
            groups = [[sequence(200, seed=seed)] for seed in range(2)]
            pending = [pool.submit(group) for group in groups]
            running.until_slots("filling", 1)
            running.signal(signal.SIGTERM)
            for group, rows in zip(groups, pending, strict=True):
                assert torch.equal(rows.wait().rows_RD, expected_rows(group))
            assert pool.stats().retries == 0
        assert process.wait(10) == 0
        assert not ready_file.exists()
        assert not runtime_dir.exists()
        assert not list(tmp_path.glob("kdmesh-*"))


async def test_draining_server_refuses_new_work_and_is_not_ready(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client, httpx.AsyncClient() as http:
        teacher.engine.hold()
        running = asyncio.create_task(client.prefill([sequence(9)], Deadline.after(10)))
        await asyncio.to_thread(teacher.engine.wait_entered)
        teacher.stop.set()
        readyz = f"http://{teacher.addresses.rest}/readyz"
        while (answer := await http.get(readyz)).status_code == 200:
            pass
        assert (answer.status_code, answer.json()) == (503, {"reason": "the server is shutting down"})
        with pytest.raises(errors.Unavailable, match="shutting down"):
            await client.prefill([sequence(9)], Deadline.after(10))
        with pytest.raises(errors.Unavailable, match="shutting down"):
            async with teacher.client():
                pass
        teacher.engine.let_go()
        assert torch.equal((await running).rows_RD, expected_rows([sequence(9)]))
        await teacher.ended


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path, engine={"seconds_per_batch": 0.3}, server={"drain_s": 60}) as running,
        TeacherPool([running.grpc], job="test", deadline_s=10) as pool,
    ):
        kept = [pool.submit([sequence(200, seed=seed)]) for seed in range(9)]
        running.until_slots("filling", 1)
        running.signal(signal.SIGTERM)
        running.wait_event("draining")
        running.signal(signal.SIGINT)
        assert running.process.wait(5) == 128 + signal.SIGINT
        assert not list(tmp_path.glob("kdmesh-*"))
        del kept


def test_sigterm_while_loading_ends_at_once(tmp_path: Path) -> None:
    with starting(tmp_path, engine={"seconds_per_batch": 60}) as process:
        wait_event(process, "listening")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not list(tmp_path.glob("kdmesh-*"))


def test_memory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with starting(tmp_path, slab={"slots": 4096, "slot_mib": 65536}) as process:
        stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert "slots" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


@pytest.mark.parametrize("key", ["port", "rest_port"])
def test_port_in_use_is_named(tmp_path: Path, key: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with starting(tmp_path, server={key: port}) as process:
            _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in stderr
    assert "model loaded" not in stderr
    assert "Traceback" not in stderr


def test_check_only_validates(tmp_path: Path) -> None:
    with starting(tmp_path, "--check") as good:
        assert (good.communicate(timeout=20)[1], good.returncode) == ("", 0)
    with starting(tmp_path, "--check", "--set", "slab.slots=0", "--set", "server.prot=1") as bad:
        assert "2 problems" in bad.communicate(timeout=20)[1]
        assert bad.returncode == 2


async def test_rest_says_why_it_is_not_ready(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, wait_ready=False, held=True) as teacher, httpx.AsyncClient() as http:
        base = f"http://{teacher.addresses.rest}"
        assert (await http.get(f"{base}/healthz")).status_code == 200
        for path in ("/readyz", "/reachz", "/v1/model", "/v1/slab", "/v1/sessions"):
            answer = await http.get(base + path)
            assert (answer.status_code, answer.json()) == (503, {"reason": "the server is loading the model"})
        assert "kdmesh_teacher_ready 0.0" in (await http.get(f"{base}/metrics")).text


def test_rest_shows_model_sessions_and_slab_and_no_secret(teacher: TeacherProcess) -> None:
    assert teacher.get("/readyz") == {"status": "ready"}
    assert teacher.get("/v1/model")["head"]["padded_vocabulary_size"] == 64
    with TeacherPool([teacher.grpc], job="a job", door="shm", deadline_s=10) as pool:
        rows = pool.submit([sequence(9)]).wait()
        (session,) = teacher.get("/v1/sessions")["sessions"]
        assert (session["job"], session["slots"]) == ("a job", 1)
        assert set(session) == {"job", "slots", "silent_s"}
        slab = teacher.get("/v1/slab")
        assert slab["slots"] == {"free": 3, "filling": 0, "ready": 0, "held": 1, "abandoned": 0}
        assert slab["waiting"] == {"requests": 0, "tokens": 0}
        del rows


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(teacher: TeacherProcess) -> Samples:
    text = httpx.get(f"http://{teacher.rest}/metrics").text
    return {
        (sample.name.removeprefix("kdmesh_teacher_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_parse_and_count(teacher: TeacherProcess) -> None:
    before = scraped(teacher)
    with (
        TeacherPool([teacher.grpc], job="counted", door="stream", deadline_s=10) as counted,
        TeacherPool([teacher.grpc], job="other", door="shm", deadline_s=10) as other,
    ):
        counted.submit([sequence(9)]).wait()
        other.submit([sequence(5)]).wait()
        with pytest.raises(errors.InvalidRequest):
            counted.submit([sequence(9, vocabulary_size=1000)]).wait()
        assert scraped(teacher)["sessions", ()] == 2
    after, job = scraped(teacher), ("kdmesh_job", "counted")
    assert after["tokens_total", (job,)] == 9
    assert after["rows_total", (job,)] == 8
    assert after["requests_total", (job, ("outcome", "ok"))] == 1
    assert after["requests_total", (job, ("outcome", "InvalidRequest"))] == 1
    assert after["queue_seconds_count", (job,)] == 1
    assert after["slots", (("state", "free"),)] == 4
    assert after["sessions", ()] == 0
    assert after["ready", ()] == 1
    for door, rows in (("stream", 8), ("shm", 4)):
        key = "bytes_total", (("door", door),)
        assert after[key] - before[key] == rows * 32


def test_port_is_not_shared_by_two_servers(teacher: TeacherProcess, tmp_path: Path) -> None:
    with starting(tmp_path, server={"port": int(teacher.grpc.split(":")[1])}) as process:
        assert f"cannot listen on {teacher.grpc} for gRPC" in process.communicate(timeout=20)[1]
        assert process.returncode == 2
