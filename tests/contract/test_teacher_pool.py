"""The trainer's side: a blocking pool that routes, retries within its deadline, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch

from kdmesh import errors
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.pending_rows import PendingRows
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherStub
from kdmesh_trainer.sources.panel import Panel
from tests.support.teacher_process import TeacherProcess, teacher_process, teacher_processes
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import running_teacher

BOTH_DOORS = pytest.mark.parametrize("door", ["shm", "stream"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with teacher_process(tmp_path_factory.mktemp("teacher")) as running:
        yield running


@BOTH_DOORS
def test_rows_come_in_the_order_of_the_group(teacher: TeacherProcess, door: DoorChoice) -> None:
    with TeacherPool([teacher.grpc], job="test", door=door, deadline_s=10) as pool:
        groups = [[sequence(20 + k, seed=k), sequence(7, seed=k + 50)] for k in range(6)]
        pending = [pool.submit(group) for group in groups]
        for group, rows in zip(groups, pending, strict=True):
            assert torch.equal(rows.wait().rows_RD, expected_rows(group))
        stats = pool.stats()
        assert (stats.door, stats.requests, stats.retries) == (door, 6, 0)


@BOTH_DOORS
def test_group_beyond_the_limits_is_asked_for_in_parts(teacher: TeacherProcess, door: DoorChoice) -> None:
    # 256 tokens a request, 4 slots: 12 parts need each slot three times.
    group = [sequence(200, seed=seed) for seed in range(12)]
    with TeacherPool([teacher.grpc], job="test", door=door, deadline_s=10) as pool:
        assert torch.equal(pool.submit(group).wait().rows_RD, expected_rows(group))
        assert pool.stats().requests == 12


async def test_the_deadline_of_rows_that_are_kept_begins_when_they_are_waited_for(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as held:

        def use() -> None:
            with TeacherPool([held.addresses.grpc], job="test", door="stream", deadline_s=1) as pool:
                held.engine.hold()
                early, late = (pool.submit([sequence(9, seed=seed)], keep=True) for seed in (0, 1))
                at_once = pool.submit([sequence(9, seed=2)])
                with pytest.raises(errors.DeadlineExpired):
                    at_once.wait()
                time.sleep(0.5)
                with pytest.raises(errors.DeadlineExpired, match="no teacher has answered within 1 s"):
                    late.wait()
                held.engine.let_go()
                assert torch.equal(early.wait().rows_RD, expected_rows([sequence(9, seed=0)]))

        await asyncio.to_thread(use)


def test_impossible_groups_are_refused_at_once(teacher: TeacherProcess) -> None:
    with TeacherPool([teacher.grpc], job="test", deadline_s=10) as pool:
        with pytest.raises(errors.InvalidRequest, match="sequence 1 has 257 tokens; the teacher takes at most 256"):
            pool.submit([sequence(5), sequence(257)])
        with pytest.raises(errors.InvalidRequest, match="no sequence"):
            pool.submit([])
        with pytest.raises(errors.InvalidRequest, match="token id 99; ids must be below 64"):
            pool.submit([sequence(2), replace(sequence(3), token_ids=np.array([1, 99, 2], np.int32))]).wait()


def test_head_stays_good_after_the_pool_and_the_teacher(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path) as running,
        TeacherPool([running.grpc], job="test", door="shm", deadline_s=10) as pool,
    ):
        head, version = pool.head()
        copy_VD = head.weight_VD.clone()
    assert torch.equal(head.weight_VD, copy_VD)
    assert version == 1


def test_the_head_comes_while_rows_hold_every_slot_and_others_wait_for_them(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path, slab={"slots": 1}, cache={"memory_mib": 1}) as running,
        TeacherPool([running.grpc], job="test", door="shm", deadline_s=10, move_after_s=60) as pool,
    ):
        rows = pool.submit([sequence(9)]).wait()
        waiting = pool.submit([sequence(9, seed=1)])
        head, _ = pool.head()
        assert len(head.weight_VD) > 0
        assert pool.find_cached([sequence(9, seed=2)]).is_kept == (False,)
        del rows
        assert torch.equal(waiting.wait().rows_RD, expected_rows([sequence(9, seed=1)]))


def test_rows_that_wait_give_their_slots_back(teacher: TeacherProcess) -> None:
    with (
        TeacherPool([teacher.grpc], job="slow", door="shm", deadline_s=10, move_after_s=0.3) as slow,
        TeacherPool([teacher.grpc], job="other", door="shm", deadline_s=10) as other,
    ):
        groups = [[sequence(9, seed=seed)] for seed in range(4)]
        pending = [slow.submit(group) for group in groups]
        teacher.until_slots("held", 4)  # all there are
        assert other.submit([sequence(9)]).wait().is_borrowed
        for group, one in zip(groups, pending, strict=True):
            assert torch.equal(one.wait().rows_RD, expected_rows(group))
        assert slow.stats().moved > 0


def test_rows_that_are_kept_hold_no_slot(teacher: TeacherProcess) -> None:
    with TeacherPool([teacher.grpc], job="early", door="shm", deadline_s=10, move_after_s=60) as pool:
        groups = [[sequence(9, seed=seed)] for seed in range(12)]  # three times the slots there are
        pending = [pool.submit(group, keep=True) for group in groups]
        for group, one in zip(groups, pending, strict=True):
            rows = one.wait()
            assert torch.equal(rows.rows_RD, expected_rows(group))
            assert not rows.is_borrowed
        assert pool.stats().moved == 0
        assert not any(one.has_failed for one in pending)
        refused = pool.submit([replace(sequence(3), token_ids=np.array([1, 99, 2], np.int32))], keep=True)
        with pytest.raises(errors.InvalidRequest, match="token id 99"):
            refused.wait()
        assert refused.has_failed


def test_rows_that_nobody_wants_any_more_give_their_slots_back(teacher: TeacherProcess) -> None:
    with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=10, move_after_s=60) as pool:
        for seed in range(12):  # three times the slots there are
            pending = pool.submit([sequence(9, seed=seed)])
            if seed % 2:
                assert pending.wait().rows_RD.shape == (8, 8)
            del pending


def test_closing_leaves_no_thread_and_no_descriptor(teacher: TeacherProcess) -> None:
    def open_and_close() -> None:
        with TeacherPool([teacher.grpc], job="test", deadline_s=10) as pool:
            rows = pool.submit([sequence(9)]).wait()
            assert rows.rows_RD.shape == (8, 8)

    open_and_close()  # what gRPC keeps for the process is there now
    gc.collect()
    process = psutil.Process()
    fds, threads = process.num_fds(), {thread.name for thread in threading.enumerate()}
    for _ in range(3):
        open_and_close()
    gc.collect()
    assert {thread.name for thread in threading.enumerate()} == threads
    until = time.monotonic() + 10
    while process.num_fds() > fds:  # gRPC closes its sockets a moment after the channel
        assert time.monotonic() < until
    assert teacher.get("/v1/sessions") == {"sessions": []}


def test_whoever_waits_when_the_pool_closes_is_told(tmp_path: Path) -> None:
    with teacher_process(tmp_path, engine={"seconds_per_batch": 0.2}) as slow:
        pool = TeacherPool([slow.grpc], job="test", deadline_s=10)
        pending = pool.submit([sequence(9)])
        pool.close()
        with pytest.raises(errors.Unavailable, match="closed"):
            pending.wait()
        pool.close()  # again does nothing


def test_rows_of_a_killed_teacher_come_from_the_other(tmp_path: Path) -> None:
    slow = {"engine": {"seconds_per_batch": 0.15}}
    with (
        teacher_processes(tmp_path, slow, slow) as (one, two),
        TeacherPool([one.grpc, two.grpc], job="test", deadline_s=20) as pool,
    ):
        groups = [[sequence(100, seed=seed)] for seed in range(6)]
        pending = [pool.submit(group) for group in groups]
        one.until_slots("filling", 1)
        one.signal(signal.SIGKILL)
        for group, rows in zip(groups, pending, strict=True):
            assert torch.equal(rows.wait().rows_RD, expected_rows(group))
        assert pool.stats().retries > 0


def test_request_waits_for_the_restart_of_the_only_teacher(tmp_path: Path) -> None:
    with teacher_process(tmp_path, engine={"seconds_per_batch": 0.15}) as first:
        port = int(first.grpc.split(":")[1])
        with TeacherPool([first.grpc], job="test", deadline_s=30) as pool:
            pending = pool.submit([sequence(9)])
            first.signal(signal.SIGKILL)
            first.process.wait()
            with teacher_process(tmp_path, server={"port": port}):
                assert torch.equal(pending.wait().rows_RD, expected_rows([sequence(9)]))
                assert pool.stats().retries > 0


def test_requests_under_way_are_cut_to_what_a_teacher_takes_that_came_back_narrower(tmp_path: Path) -> None:
    group = [sequence(60, seed=seed) for seed in range(4)]
    with teacher_process(tmp_path) as first:
        port = int(first.grpc.split(":")[1])
        with TeacherPool([first.grpc], job="test", deadline_s=30) as pool:
            first.signal(signal.SIGKILL)
            first.process.wait()
            pending = pool.submit(group)  # one request
            with teacher_process(tmp_path, server={"port": port}, engine={"max_batch_tokens": 128}):
                assert torch.equal(pending.wait().rows_RD, expected_rows(group))
                assert pool.stats().requests == 2


def test_lost_session_is_opened_again(teacher: TeacherProcess) -> None:
    with TeacherPool([teacher.grpc], job="test", deadline_s=10) as pool:
        (replica,) = pool._fleet._replicas._replicas
        assert replica.client is not None
        session = replica.client._session
        with grpc.insecure_channel(teacher.grpc) as channel:
            TeacherStub(channel).CloseSession(pb.CloseSessionRequest(session=session))
        assert torch.equal(pool.submit([sequence(9)]).wait().rows_RD, expected_rows([sequence(9)]))
        assert replica.client._session != session


def test_another_model_after_a_restart_is_refused(tmp_path: Path) -> None:
    with teacher_process(tmp_path) as first:
        port = int(first.grpc.split(":")[1])
        with TeacherPool([first.grpc], job="test", deadline_s=30) as pool:
            first.signal(signal.SIGKILL)
            first.process.wait()
            pending = pool.submit([sequence(9)])
            with (
                teacher_process(tmp_path, server={"port": port}, engine={"hidden_size": 16}),
                pytest.raises(errors.ModelMismatch, match="fa4e00000010"),
            ):
                pending.wait()


def test_teachers_of_different_models_are_refused(teacher: TeacherProcess, tmp_path: Path) -> None:
    with teacher_process(tmp_path, engine={"hidden_size": 16}) as other, pytest.raises(errors.ModelMismatch):
        TeacherPool([teacher.grpc, other.grpc], job="test", deadline_s=10)


def test_teacher_that_never_answers_is_named() -> None:
    with pytest.raises(errors.DeadlineExpired, match=r"no teacher is ready within 0\.3 s \(127\.0\.0\.1:1: refuses"):
        TeacherPool(["127.0.0.1:1"], job="test", deadline_s=0.3)


def test_teacher_that_hangs_is_left_for_another(tmp_path: Path) -> None:
    lease = {"slab": {"lease_s": 1.0}}
    with (
        teacher_processes(tmp_path, lease, lease) as (one, two),
        TeacherPool([one.grpc, two.grpc], job="test", deadline_s=20) as pool,
    ):
        one.signal(signal.SIGSTOP)
        groups = [[sequence(100, seed=seed)] for seed in range(4)]
        pending = [pool.submit(group) for group in groups]
        for group, rows in zip(groups, pending, strict=True):
            assert torch.equal(rows.wait().rows_RD, expected_rows(group))


def test_a_lost_session_leaves_no_connection_to_the_garbage_collector(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path, slab={"lease_s": 1.0}) as running,
        TeacherPool([running.grpc], job="test", door="stream", deadline_s=20) as pool,
    ):
        port = int(running.grpc.split(":")[1])

        def num_connections() -> int:
            return sum(one.raddr[1:] == (port,) for one in psutil.Process().net_connections("tcp"))

        gc.disable()
        try:
            running.signal(signal.SIGSTOP)
            while pool._fleet._replicas.clients:
                pass
            running.signal(signal.SIGCONT)
            pool.submit([sequence(9)]).wait()
            until = time.monotonic() + 10
            while num_connections() > 1:  # gRPC closes its sockets a moment after the channel
                assert time.monotonic() < until
        finally:
            gc.enable()


def test_forced_shared_memory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with teacher_process(tmp_path, server={"runtime_dir": str(tmp_path / "run")}) as running:
        for path in (tmp_path / "run").iterdir():
            os.rename(path, tmp_path / "elsewhere")  # as on another node
        with pytest.raises(errors.ConfigError, match=r"door shm, but 127\.0\.0\.1:[0-9]+ is not to be had that way"):
            TeacherPool([running.grpc], job="test", door="shm", deadline_s=10)
        with TeacherPool([running.grpc], job="test", door="auto", deadline_s=10) as pool:
            (reason,) = pool.stats().doors.values()
            assert list(pool.stats().doors) == ["stream"] and reason.startswith("shm: no shared memory through ")


def test_jobs_that_name_two_teachers_of_one_slot_in_another_order_do_not_wait_for_each_other(tmp_path: Path) -> None:
    have_first = threading.Barrier(2)

    @dataclass
    class Turn:
        """Asks when both jobs have what they asked their first teacher for."""

        pool: TeacherPool
        is_first: bool

        def submit(self, sequences: Sequence[TokenSequence]) -> PendingRows:
            if not self.is_first:
                have_first.wait(10)
            pending = self.pool.submit(sequences)
            while self.is_first and not pending.is_done:
                time.sleep(0.01)
            return pending

    def ask(addresses: Sequence[str]) -> float:
        first, second = (TeacherPool([address], job=addresses[0], deadline_s=8) for address in addresses)
        with first, second:
            panel = Panel({"a": Turn(first, is_first=True), "b": Turn(second, is_first=False)}, asks_all=True)
            began_s = time.monotonic()
            rows = panel.submit([sequence(9)]).wait()
            assert all(torch.equal(part.rows.rows_RD, expected_rows([sequence(9)])) for part in rows.parts)
            return time.monotonic() - began_s

    narrow = {"slab": {"slots": 1, "slots_per_session": 1}}
    with teacher_processes(tmp_path, narrow, narrow) as (one, two), ThreadPoolExecutor(2) as jobs:
        took_s = list(jobs.map(ask, [(one.grpc, two.grpc), (two.grpc, one.grpc)]))
    assert max(took_s) < 1.5, "nothing waited until rows that nobody takes are moved"
