"""A pool whose teachers get new weights: it takes rows of no others, whoever has been restarted or updated."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdmesh import errors
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.routing import RoutingPolicy
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.fleet import TeacherFleet
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.rpc.weights.services import TEACHERS
from kdmesh.types import DType
from kdmesh.weights.manifest import TensorSpec
from tests.support.teacher_process import teacher_process
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import running_teacher

FINGERPRINT = "fa4e000000080000003c"
ASKED = [sequence(30)]


def publish(version: int, *addresses: str, job: str = "") -> None:
    """Weights that double the rows so many times."""
    trunk, head = torch.full((8,), 2.0**version), torch.full((64, 8), float(version))
    with WeightSender(addresses, service=TEACHERS, job=job, bucket_bytes=2**12, deadline_s=20) as sender:
        sender.publish(
            version,
            FINGERPRINT,
            [
                (TensorSpec(name="trunk", shape=(8,), dtype=DType.FLOAT32), lambda: trunk),
                (TensorSpec(name="head", shape=(64, 8), dtype=DType.FLOAT32), lambda: head),
            ],
        )


def rows_and_head(pool: TeacherPool, version: int) -> tuple[Tensor, Tensor]:
    rows, (head, belongs_to) = pool.submit(ASKED).wait(), pool.head()
    assert rows.weight_version == belongs_to == version
    blank, its_version = pool.blank_head()
    assert its_version == version and blank.weight_VD.shape == head.weight_VD.shape and not blank.weight_VD.any()
    assert blank.weight_VD.dtype == head.weight_VD.dtype
    return rows.rows_RD.clone(), head.weight_VD.clone()


def test_a_restarted_teacher_is_used_again_when_it_has_the_weights_and_not_before(tmp_path: Path) -> None:
    updatable = {"updatable": True}
    with teacher_process(tmp_path, engine=updatable) as first, teacher_process(tmp_path, engine=updatable) as second:
        addresses = [first.grpc, second.grpc]
        with TeacherPool(addresses, job="test", deadline_s=20) as pool:
            publish(2, *addresses)
            pool.follow(2)
            first.signal(signal.SIGKILL)
            first.process.wait()
            port = {"port": int(first.grpc.split(":")[1])}
            with teacher_process(tmp_path, engine=updatable, server=port) as again:
                (replica, _) = pool._fleet._replicas._replicas
                while "has weight version 1; this job's teacher has 2" not in str(replica.last_error):
                    rows_RD, head_VD = rows_and_head(pool, 2)
                    assert torch.equal(rows_RD, expected_rows(ASKED) * 4) and bool((head_VD == 2).all())
                publish(3, *addresses)
                pool.follow(3)
                second.signal(signal.SIGKILL)
                rows_RD, head_VD = rows_and_head(pool, 3)
                assert torch.equal(rows_RD, expected_rows(ASKED) * 8) and bool((head_VD == 3).all())
                assert again.get("/v1/weights")["version"] == 3


def test_weights_of_another_job_are_noticed_before_a_row_is_used(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path, engine={"updatable": True}) as teacher,
        TeacherPool([teacher.grpc], job="test", deadline_s=20) as pool,
    ):
        publish(2, teacher.grpc)
        pool.follow(2)
        rows_and_head(pool, 2)
        publish(3, teacher.grpc)
        with pytest.raises(errors.ModelMismatch, match="for weight version 2; this server has 3"):
            pool.submit(ASKED).wait()


def test_a_teacher_follows_one_job_as_long_as_that_is_connected(tmp_path: Path) -> None:
    with teacher_process(tmp_path, engine={"updatable": True}) as teacher:
        with TeacherPool([teacher.grpc], job="first", deadline_s=20) as pool:
            publish(2, teacher.grpc, job="first")
            for other in ("second", ""):
                with pytest.raises(errors.ModelMismatch, match=r"follow job first, which is connected; job .* own"):
                    publish(3, teacher.grpc, job=other)
            publish(3, teacher.grpc, job="first")
            pool.follow(3)
            rows_and_head(pool, 3)
        publish(4, teacher.grpc, job="second")


def test_a_job_whose_update_is_refused_is_not_followed(tmp_path: Path) -> None:
    with teacher_process(tmp_path, engine={"updatable": True}) as teacher:
        publish(5, teacher.grpc, job="first")
        with TeacherPool([teacher.grpc], job="second", deadline_s=20):
            with pytest.raises(errors.ModelMismatch, match="version 2 is not newer than the one served, 5"):
                publish(2, teacher.grpc, job="second")
            publish(6, teacher.grpc, job="first")


def test_nobody_waits_for_rows_when_the_only_teacher_has_lost_its_weights(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path, engine={"updatable": True}) as first,
        TeacherPool([first.grpc], job="test", deadline_s=100) as pool,
    ):
        publish(2, first.grpc)
        pool.follow(2)
        first.signal(signal.SIGKILL)
        first.process.wait()
        port = {"port": int(first.grpc.split(":")[1])}
        with (
            teacher_process(tmp_path, engine={"updatable": True}, server=port),
            pytest.raises(errors.ModelMismatch, match="no teacher has weight version 2 any more"),
        ):
            pool.submit(ASKED).wait()


async def test_nobody_waits_for_rows_when_a_teacher_without_the_weights_has_moved(tmp_path: Path) -> None:
    found: list[str] = []

    async def resolve(name: str, port: int) -> list[str]:
        return found

    async with (
        running_teacher(tmp_path, engine={"updatable": True}) as one,
        running_teacher(tmp_path, engine={"updatable": True}) as other,
    ):
        addresses = [one.addresses.grpc, other.addresses.grpc]
        found[:] = addresses[:1]
        options, routing = SessionOptions(job="test", door="stream"), RoutingPolicy(look_every_s=0.01)
        fleet = TeacherFleet(Discovery(["dns:///teachers:1"], resolve), options, routing=routing)
        try:
            await fleet.start(Deadline.after(20))
            fleet.follow(2)
            for address in reversed(addresses):  # as pods that are started anew, at another address each time
                found[:] = [address]
                said = ""
                while f"any more: {address} were started anew" not in said:
                    await asyncio.sleep(0)  # a refusal waits for nothing
                    with pytest.raises(errors.ModelMismatch) as mismatch:
                        await fleet.ask(ASKED, Deadline.after(5), 2)
                    said = str(mismatch.value)
        finally:
            await fleet.close()


def test_heads_that_are_out_of_date_take_no_memory_of_the_client(tmp_path: Path) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:kdmesh")

    with (
        teacher_process(tmp_path, engine={"updatable": True}) as teacher,
        TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=20) as pool,
    ):
        counts = []
        for version in range(2, 6):
            publish(version, teacher.grpc)
            pool.follow(version)
            head, belongs_to = pool.head()
            assert belongs_to == version and bool((head.weight_VD == version).all())
            del head
            counts.append(mappings())
        assert len(set(counts)) == 1


def test_who_waits_for_the_head_of_a_teacher_that_is_gone_is_told_when_it_is_given_up(tmp_path: Path) -> None:
    with (
        teacher_process(tmp_path, engine={"updatable": True}) as teacher,
        TeacherPool([teacher.grpc], job="test", deadline_s=3600) as pool,
        ThreadPoolExecutor(max_workers=1) as waiting,
    ):
        teacher.signal(signal.SIGKILL)
        teacher.process.wait()
        asked = waiting.submit(pool.head)
        while not asked.done():
            pool.give_up()
            wait([asked], timeout=0.1)
        with pytest.raises(errors.Unavailable, match="was given up"):
            asked.result()
