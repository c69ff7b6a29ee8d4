"""Many rollout servers behind one blocking pool: nothing is lost with a server, and nothing is used twice."""

from __future__ import annotations

import asyncio
import gc
import queue
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdmesh import errors
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.types import Sample, Sampling
from tests.support.rollout_samples import expected_tokens, prompt
from tests.support.rollout_server import rollout_process, running_rollout
from tests.support.teacher_process import TeacherProcess

SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with rollout_process(tmp_path_factory.mktemp("rollout")) as process:
        yield process


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with rollout_process(tmp_path_factory.mktemp("slow"), engine={"seconds_per_step": 0.05}) as process:
        yield process


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def running(server: TeacherProcess) -> int:
    queue = server.get("/v1/queue")
    return int(queue["running"]) + int(queue["waiting"]["samples"])


def test_samples_come_in_the_order_of_their_seeds(server: TeacherProcess) -> None:
    with RolloutPool([server.grpc], job="test", deadline_s=10) as pool:
        assert pool.describe().vocabulary_size == 60
        pending = [pool.submit(prompt(seed=n), SAMPLING, num_samples=4, seed=10 * n) for n in range(5)]
        for n, one in enumerate(pending):
            assert tokens(one.wait()) == [expected_tokens(prompt(seed=n), 10 * n + i, 6) for i in range(4)]
            assert one.is_done
        stats = pool.stats()
        assert (stats.samples, stats.retries) == (20, 0)


def test_every_sample_is_told_of_once_as_it_comes(slow_server: TeacherProcess) -> None:
    ids = prompt()
    short = Sampling(max_new_tokens=12, stop_token_ids=(expected_tokens(ids, 0, 1)[0],))
    with RolloutPool([slow_server.grpc], job="test", deadline_s=10) as pool:
        told: queue.Queue[Sample] = queue.Queue()
        pending = pool.submit(ids, short, num_samples=2, seed=0, on_sample=told.put)
        first = told.get()
        assert not pending.is_done  # the other one is longer
        assert pending.wait() == [first, told.get()]
        assert told.empty()


async def test_samples_that_are_asked_for_ahead_have_the_time_of_those_before_them() -> None:
    async with running_rollout() as held:

        def use(requests_ahead: int) -> list[list[int]]:
            with RolloutPool([held.addresses.grpc], job="test", deadline_s=1, requests_ahead=requests_ahead) as pool:
                return tokens(pool.submit(prompt(), SAMPLING, num_samples=1, seed=7).wait())

        held.engine.hold()
        with pytest.raises(errors.DeadlineExpired):
            await asyncio.to_thread(use, 0)
        waiting = asyncio.create_task(asyncio.to_thread(use, 20))
        await asyncio.sleep(1.2)
        held.engine.let_go()
        assert await waiting == [expected_tokens(prompt(), 7, 6)]


def test_dropping_what_is_pending_aborts_it(slow_server: TeacherProcess) -> None:
    with RolloutPool([slow_server.grpc], job="test", deadline_s=30) as pool:
        pending = pool.submit(prompt(), Sampling(max_new_tokens=50), num_samples=30, seed=0)
        while running(slow_server) == 0:
            pass  # each look is a round trip
        del pending
        gc.collect()
        while running(slow_server):
            pass
        assert pool.stats().samples == 0


def test_a_killed_server_loses_no_sample_and_none_comes_twice(tmp_path: Path) -> None:
    with (
        rollout_process(tmp_path, engine={"seconds_per_step": 0.01, "max_running": 4}) as victim,
        rollout_process(tmp_path, engine={"max_running": 4}) as other,
        RolloutPool([victim.grpc, other.grpc], job="test", deadline_s=20) as pool,
    ):
        told: list[list[Sample]] = [[] for _ in range(4)]
        pending = [
            pool.submit(prompt(seed=n), SAMPLING, num_samples=24, seed=100 * n, on_sample=told[n].append)
            for n in range(4)
        ]
        while sum(map(len, told[::2])) < 4:  # of the victim's, some have come and some have not
            pass
        victim.signal(signal.SIGKILL)
        for n, one in enumerate(pending):
            expected = [expected_tokens(prompt(seed=n), 100 * n + i, 6) for i in range(24)]
            assert tokens(one.wait()) == expected
            assert sorted(tokens(told[n])) == sorted(expected)
        stats = pool.stats()
        assert stats.samples == 96
        assert stats.retries > 0


def test_a_request_waits_for_the_restart_of_the_only_server(tmp_path: Path) -> None:
    with rollout_process(tmp_path, engine={"seconds_per_step": 0.2}) as first:
        port = int(first.grpc.split(":")[1])
        with RolloutPool([first.grpc], job="test", deadline_s=30) as pool:
            pending = pool.submit(prompt(), SAMPLING, num_samples=2, seed=0)
            first.signal(signal.SIGKILL)
            first.process.wait()
            with rollout_process(tmp_path, server={"port": port}):
                assert tokens(pending.wait()) == [expected_tokens(prompt(), i, 6) for i in range(2)]


def test_sigterm_finishes_what_is_under_way_and_takes_nothing_new(tmp_path: Path) -> None:
    with (
        rollout_process(tmp_path, engine={"seconds_per_step": 0.1}) as leaving,
        RolloutPool([leaving.grpc], job="test", deadline_s=1.5) as pool,
    ):
        pending = pool.submit(prompt(), SAMPLING, num_samples=2, seed=0)
        while running(leaving) == 0:
            pass
        leaving.signal(signal.SIGTERM)
        leaving.wait_event("draining")
        assert tokens(pending.wait()) == [expected_tokens(prompt(), i, 6) for i in range(2)]
        assert leaving.process.wait(5) == 0
        with pytest.raises(errors.DeadlineExpired):
            pool.submit(prompt(), SAMPLING, num_samples=1, seed=0).wait()


def test_weights_that_no_server_has_are_refused_as_such(server: TeacherProcess, slow_server: TeacherProcess) -> None:
    with RolloutPool([server.grpc, slow_server.grpc], job="test", deadline_s=10) as pool:
        pending = pool.submit(prompt(), SAMPLING, num_samples=1, seed=0, min_weight_version=2)
        with pytest.raises(errors.ModelMismatch, match="version 2 or newer; this server has 0"):
            pending.wait()


def test_servers_of_different_models_are_refused(server: TeacherProcess, tmp_path: Path) -> None:
    with (
        rollout_process(tmp_path, engine={"vocabulary_size": 61}) as other,
        pytest.raises(errors.ModelMismatch, match="all rollout servers of a job must serve the same model"),
    ):
        RolloutPool([server.grpc, other.grpc], job="test", deadline_s=10)


def test_another_architecture_than_wanted_is_refused(server: TeacherProcess) -> None:
    with pytest.raises(errors.ModelMismatch, match="this job is for abc"):
        RolloutPool([server.grpc], job="test", deadline_s=10, architecture_fingerprint="abc")


def test_the_deadline_names_why_nobody_answers() -> None:
    with pytest.raises(errors.DeadlineExpired, match=r"no rollout server is ready within 0\.2 s"):
        RolloutPool(["127.0.0.1:9"], job="test", deadline_s=0.2)


def test_a_bad_request_fails_where_it_is_waited_for(server: TeacherProcess) -> None:
    with RolloutPool([server.grpc], job="test", deadline_s=10) as pool:
        pending = pool.submit(np.array([1, 60], np.int32), SAMPLING, num_samples=1, seed=0)
        with pytest.raises(errors.InvalidRequest, match="token id 60; ids must be below 60"):
            pending.wait()


def test_closing_the_pool_wakes_whoever_waits(slow_server: TeacherProcess) -> None:
    pool = RolloutPool([slow_server.grpc], job="test", deadline_s=30)
    pending = pool.submit(prompt(), Sampling(max_new_tokens=50), num_samples=1, seed=0)
    pool.close()
    with pytest.raises(errors.Unavailable):
        pending.wait()
