"""Rows that were computed before: the same bits without the engine, for whoever may have them."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from kdmesh import errors
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.serving.engine.revival import RestartLimits
from kdmesh.types import EVERY_TAG, TokenSequence
from kdmesh_teacher.cache.directory import RowDirectory
from kdmesh_teacher.cache.row_cache import RowCache
from kdmesh_teacher.config import FakeEngine
from tests.contract.test_teacher_weights import factors, publish
from tests.support.teacher_engines import MortalEngine
from tests.support.teacher_process import TeacherProcess, teacher_process
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher, served, teacher_config

MEMORY: dict[str, Any] = {"memory_mib": 1}
SLOW: dict[str, Any] = {"max_batch_tokens": 40, "seconds_per_batch": 0.1}  # rows are kept while it computes others


def directory(path: Path, mib: float = 1) -> dict[str, Any]:
    return {"directory": str(path / "cache"), "directory_mib": mib}


async def ask(client: TeacherClient, *asked: TokenSequence, version: int = 0) -> None:
    """Get the rows of these sequences, and see that they are the right ones."""
    rows = await client.prefill(asked, Deadline.after(10), weight_version=version)
    assert torch.equal(rows.rows_RD, expected_rows(asked))
    assert rows.weight_version == 1


async def get(address: str, path: str) -> Any:
    async with httpx.AsyncClient() as http:
        return (await http.get(f"http://{address}{path}")).json()


async def metrics(address: str) -> Mapping[str, float]:
    """Samples by name, summed over their labels."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://{address}/metrics")).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("kdmesh_teacher_")
            found[name] = found.get(name, 0) + sample.value
    return found


@pytest.mark.parametrize("door", ["shm", "stream"])
@pytest.mark.parametrize("place", ["memory", "directory"])
async def test_what_was_asked_before_needs_no_prefill(tmp_path: Path, place: str, door: DoorChoice) -> None:
    cache = MEMORY if place == "memory" else directory(tmp_path)
    asked = [sequence(30, seed=seed, every=1 + seed % 3) for seed in range(6)]
    async with running_teacher(tmp_path, cache=cache) as teacher, teacher.client(door=door) as client:
        for pair in (asked[:2], asked[2:4], asked[4:]):
            await ask(client, *pair)
        tokens = (await metrics(teacher.addresses.rest))["tokens_total"]
        await until_kept(teacher, 6)
        teacher.engine.batches.clear()
        await ask(client, *asked[::-1])  # in another order, and in other company
        assert teacher.engine.batches == []
        now = await metrics(teacher.addresses.rest)
        assert now["tokens_total"] == tokens == 180
        assert (now["cache_hits_total"], now["cache_misses_total"], now["cache_hit_tokens_total"]) == (6, 6, 180)
        assert now["cache_hit_bytes_total"] == sum(s.num_rows for s in asked) * 32


async def until_kept(teacher: RunningTeacher, entries: int) -> None:
    """Return when so many sequences can be found in every tier; files are written after the answer."""
    async with asyncio.timeout(10):
        while True:
            state = await get(teacher.addresses.rest, "/v1/cache")
            if all(tier is None or tier["entries"] == entries for tier in (state["memory"], state["directory"])):
                return


async def until_waiting(teacher: RunningTeacher, *, tokens: int) -> None:
    """Return when some requests wait, which cost so much."""
    async with asyncio.timeout(10):
        while True:
            waiting = (await get(teacher.addresses.rest, "/v1/slab"))["waiting"]
            if waiting["requests"] and waiting["tokens"] == tokens:
                return


async def test_only_what_is_missing_of_a_request_is_computed(tmp_path: Path) -> None:
    asked = [sequence(20 + seed, seed=seed) for seed in range(5)]
    async with running_teacher(tmp_path, cache=MEMORY) as teacher, teacher.client() as client:
        await ask(client, asked[1], asked[3])
        teacher.engine.batches.clear()
        before = await metrics(teacher.addresses.rest)
        await ask(client, *asked)
        assert teacher.engine.batches == [3]  # 0, 2 and 4, with kept ones in between
        now = await metrics(teacher.addresses.rest)
        assert now["tokens_total"] - before["tokens_total"] == 20 + 22 + 24
        assert now["rows_total"] - before["rows_total"] == 19 + 21 + 23


async def test_processes_of_an_engine_write_only_what_is_missing(tmp_path: Path) -> None:
    config = teacher_config(cache=MEMORY)
    assert isinstance(config.engine, FakeEngine)
    engine = MortalEngine(config.engine, RestartLimits(restarts=2, window_s=60))
    asked = [sequence(20 + seed, seed=seed) for seed in range(3)]
    async with served(config, engine, tmp_path) as (addresses, _, _):
        client = await TeacherClient.connect(addresses.grpc, SessionOptions(job="test", door="shm"))
        await ask(client, asked[0])
        engine.offsets.clear()
        await ask(client, *asked)
        assert engine.offsets == [19 * 32]
        await client.close()


async def test_kept_rows_do_not_wait_for_the_engine(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, cache=MEMORY) as teacher,
        teacher.client() as client,
        teacher.client() as other,
    ):
        await ask(client, sequence(30))
        teacher.engine.hold()
        held = asyncio.create_task(ask(other, sequence(40)))
        await asyncio.to_thread(teacher.engine.wait_entered)
        await ask(client, sequence(30))
        assert not held.done()
        teacher.engine.let_go()
        await held


async def test_what_another_request_brought_meanwhile_is_not_computed_again(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, cache=MEMORY | {"shared": True}, engine=SLOW) as teacher,
        teacher.client(job="a") as a,
        teacher.client(job="b") as b,
    ):
        teacher.engine.hold()
        teacher.engine.batches.clear()
        first = asyncio.create_task(ask(a, sequence(30)))
        await asyncio.to_thread(teacher.engine.wait_entered)
        between = asyncio.create_task(ask(b, sequence(31)))
        await until_waiting(teacher, tokens=31)
        second = asyncio.create_task(ask(b, sequence(30)))
        await until_waiting(teacher, tokens=61)
        teacher.engine.let_go()
        await asyncio.gather(first, between, second)
        assert teacher.engine.batches == [1, 1]
        now = await metrics(teacher.addresses.rest)
        assert now["tokens_total"] == 61
        assert now["job_tokens_in_flight"] == 0


async def test_kept_rows_need_a_slot_and_wait_for_it(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, cache=MEMORY, slab={"slots": 1}) as teacher,
        teacher.client(door="shm") as client,
    ):
        rows = await client.prefill([sequence(30)], Deadline.after(10))
        waiting = asyncio.create_task(ask(client, sequence(30)))
        await until_waiting(teacher, tokens=0)
        del rows
        await waiting


async def test_a_job_gets_nothing_that_only_another_asked_for(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, cache=MEMORY) as teacher,
        teacher.client(job="a") as a,
        teacher.client(job="b") as b,
    ):
        await ask(a, sequence(30))
        teacher.engine.batches.clear()
        await ask(b, sequence(30))
        assert teacher.engine.batches == [1]
        await ask(a, sequence(30))
        await ask(b, sequence(30))
        assert teacher.engine.batches == [1]


@pytest.mark.parametrize(("shared", "computed"), [(True, []), (["a", "b"], []), (["a", "c"], [1])])
async def test_jobs_that_share_get_each_others_rows(tmp_path: Path, shared: Any, computed: list[int]) -> None:
    async with (
        running_teacher(tmp_path, cache=MEMORY | {"shared": shared}) as teacher,
        teacher.client(job="a") as a,
        teacher.client(job="b") as b,
    ):
        await ask(a, sequence(30))
        teacher.engine.batches.clear()
        await ask(b, sequence(30))
        assert teacher.engine.batches == computed


async def test_rows_of_other_weights_are_a_miss(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, cache=MEMORY, engine={"updatable": True}) as teacher,
        teacher.client() as client,
    ):
        for computed in ([1], []):
            teacher.engine.batches.clear()
            await ask(client, sequence(30), version=1)
            assert teacher.engine.batches == computed
        await publish(teacher, 2)
        for computed in ([1], []):
            teacher.engine.batches.clear()
            rows = await client.prefill([sequence(30)], Deadline.after(10), weight_version=2)
            assert torch.equal(rows.rows_RD, expected_rows([sequence(30)]) * factors(2))
            assert teacher.engine.batches == computed
            assert rows.weight_version == 2
        teacher.engine.batches.clear()
        await client.prefill([sequence(30)], Deadline.after(10))  # any version: that of its turn, unknown before it
        assert teacher.engine.batches == [1]


async def test_a_damaged_file_is_computed_again_without_anybody_noticing(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, cache=directory(tmp_path)) as teacher, teacher.client() as client:
        await ask(client, sequence(30), sequence(31))
        await until_kept(teacher, 2)
        for file in (tmp_path / "cache").glob("??/*"):
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        teacher.engine.batches.clear()
        await ask(client, sequence(30), sequence(31))
        assert teacher.engine.batches == [1]
        assert (await metrics(teacher.addresses.rest))["cache_corrupt_total"] == 2
        await until_kept(teacher, 2)
        await ask(client, sequence(31))
        assert teacher.engine.batches == [1]


async def test_a_file_that_cannot_be_read_now_is_computed_again_and_answers_later(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, cache=directory(tmp_path)) as teacher, teacher.client() as client:
        await ask(client, sequence(30))
        await until_kept(teacher, 1)
        (file,) = (tmp_path / "cache").glob("??/*")
        file.rename(away := tmp_path / "away")
        file.mkdir()  # cannot be read, even by root
        teacher.engine.batches.clear()
        await ask(client, sequence(30))
        assert teacher.engine.batches == [1]
        file.rmdir()
        away.rename(file)
        await ask(client, sequence(30))
        assert teacher.engine.batches == [1]
        assert (await metrics(teacher.addresses.rest))["cache_corrupt_total"] == 0


async def test_a_request_whose_kept_rows_are_gone_counts_once_for_its_jobs_rate(tmp_path: Path) -> None:
    kept = directory(tmp_path) | {"shared": True}
    jobs = {"overrides": {"seldom": {"max_requests_per_s": 0.001}}}
    async with (
        running_teacher(tmp_path, cache=kept, jobs=jobs, queue={"max_wait_s": 2}) as teacher,
        teacher.client() as client,
        teacher.client(job="seldom") as seldom,
    ):
        await ask(client, sequence(30))
        async with asyncio.timeout(10):
            while not (files := [file for file in (tmp_path / "cache").glob("??/*") if file.suffix != ".part"]):
                await get(teacher.addresses.rest, "/v1/cache")
        files[0].unlink()
        teacher.engine.batches.clear()
        await ask(seldom, sequence(30))
        assert teacher.engine.batches == [1]
        with pytest.raises(errors.Unavailable, match=r"may start 0\.001 requests a second"):
            await ask(seldom, sequence(30))


async def test_a_disk_that_fails_fails_no_request_and_is_seen(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, cache=directory(tmp_path)) as teacher, teacher.client() as client:
        for prefix in range(256):
            (tmp_path / "cache" / f"{prefix:02x}").write_bytes(b"")  # where a directory should be
        await ask(client, sequence(30))
        while not (state := await get(teacher.addresses.rest, "/v1/cache"))["refusal"]:
            pass
        assert str(tmp_path / "cache") in state["refusal"]
        assert state["directory"]["entries"] == 0
        await ask(client, sequence(30), sequence(31))
        now = await metrics(teacher.addresses.rest)
        assert (now["cache_skipped_total"], now["cache_writes"], now["cache_hits_total"]) == (3, 0, 0)


async def test_rows_that_are_gone_once_the_engine_sleeps_wait_until_it_is_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_reading, has_gone = threading.Event(), threading.Event()

    def evicted(*_: object) -> None:
        is_reading.set()
        has_gone.wait()
        raise FileNotFoundError

    async with running_teacher(tmp_path, cache=directory(tmp_path)) as teacher, teacher.client() as client:
        await ask(client, sequence(30))
        await until_kept(teacher, 1)
        teacher.engine.batches.clear()
        monkeypatch.setattr(RowDirectory, "read", evicted)
        asking = asyncio.create_task(client.prefill([sequence(30)], Deadline.after(10)))
        await asyncio.to_thread(is_reading.wait)
        await client.sleep(EVERY_TAG, drain_s=5)
        has_gone.set()
        with pytest.raises(errors.Unavailable, match="sleep"):
            await asking
        assert teacher.engine.batches == []
        await client.wake(EVERY_TAG)
        await ask(client, sequence(30))
        assert teacher.engine.batches == [1]


async def test_a_cache_that_breaks_fails_its_request_and_gives_the_slot_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> bool:
        raise RuntimeError("secret of the machine")

    async with running_teacher(tmp_path, cache=MEMORY, slab={"slots": 1}) as teacher, teacher.client() as client:
        with monkeypatch.context() as patched:
            patched.setattr(RowCache, "complete", broken)
            with pytest.raises(errors.EngineFailure, match="the cache failed"):
                await ask(client, sequence(30))
        await ask(client, sequence(30))


async def test_rows_that_nobody_will_ask_for_again_are_not_kept(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, cache=MEMORY) as teacher:

        def ask_once() -> None:
            with TeacherPool([teacher.addresses.grpc], job="test", uses_cache=False) as pool:
                for _ in range(2):
                    assert torch.equal(pool.submit([sequence(30)]).wait().rows_RD, expected_rows([sequence(30)]))

        teacher.engine.batches.clear()
        await asyncio.to_thread(ask_once)
        assert teacher.engine.batches == [1, 1]
        assert (await get(teacher.addresses.rest, "/v1/cache"))["memory"]["entries"] == 0


async def test_without_a_budget_nothing_is_kept(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client:
        teacher.engine.batches.clear()
        await ask(client, sequence(30))
        await ask(client, sequence(30))
        assert teacher.engine.batches == [1, 1]
        assert await get(teacher.addresses.rest, "/v1/cache") == {"is_on": False}


BIG: dict[str, Any] = {"hidden_size": 1024}
ROOM: dict[str, Any] = {"slot_mib": 2}


def rows_in_time(teacher: TeacherProcess, asked: list[TokenSequence]) -> None:
    with TeacherPool([teacher.grpc], job="test", deadline_s=20) as pool:
        for one in asked:
            rows = pool.submit([one]).wait()
            assert torch.equal(rows.rows_RD, expected_rows([one], 1024))


def test_a_server_killed_while_it_writes_leaves_only_whole_rows(tmp_path: Path) -> None:
    asked = [sequence(250, seed=seed) for seed in range(40)]  # 1 MB each
    cache = directory(tmp_path, mib=64)
    with (
        teacher_process(tmp_path, engine=BIG, slab=ROOM, cache=cache) as teacher,
        TeacherPool([teacher.grpc], job="test", deadline_s=20) as pool,
    ):
        waiting = [pool.submit([one]) for one in asked]
        while len(list((tmp_path / "cache").glob("??/*"))) < 3:
            pass
        teacher.signal(signal.SIGKILL)
        teacher.process.wait()
        del waiting
    with teacher_process(tmp_path, engine=BIG, slab=ROOM, cache=cache) as teacher:
        assert not list((tmp_path / "cache").glob("??/*.part"))
        kept = teacher.get("/v1/cache")["directory"]["entries"]
        rows_in_time(teacher, asked)
        assert teacher.get("/v1/cache")["corrupt"] == 0
        teacher.signal(signal.SIGTERM)
        assert teacher.process.wait() == 0
    with teacher_process(tmp_path, engine=BIG, slab=ROOM, cache=cache) as teacher:
        assert teacher.get("/v1/cache")["directory"]["entries"] == 40 > kept
        rows_in_time(teacher, asked)
        text = httpx.get(f"http://{teacher.rest}/metrics").text
        assert "kdmesh_teacher_tokens_total{" not in text  # nothing was prefilled
        assert 'kdmesh_teacher_cache_hits_total{kdmesh_job="test"} 40.0' in text
