"""What pools and senders of a job do where servers ask who calls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import DeadlineExpired, InvalidRequest, PermissionDenied, Unauthenticated
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts.client import RolloutClient
from kdmesh.rpc.rollouts.fleet import RolloutFleet
from kdmesh.rpc.teachers.fleet import TeacherFleet
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import EVERY_TAG, DType
from kdmesh.weights.manifest import TensorSpec
from kdmesh.weights.packing import Weights
from tests.support.identities import JOB, OPERATOR, OTHER, VIEWER, access_with, write_tokens
from tests.support.rollout_server import running_rollout
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import running_teacher

FINGERPRINT = "fa4e0000003cfloat32"  # of the fake engine


def fleet(address: str, access: AccessConfig) -> TeacherFleet:
    return TeacherFleet(Discovery([address]), SessionOptions(job="label", door="stream", access=access))


async def test_a_job_that_was_never_let_in_is_told_at_once(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", JOB, VIEWER)
    section = {"auth": {"tokens": str(path)}}
    async with running_teacher(tmp_path, server=section) as teacher, running_rollout(server=section) as rollout:
        for access, kind in ((OPEN_ACCESS, Unauthenticated), (access_with(VIEWER, tmp_path), PermissionDenied)):
            teachers = fleet(teacher.addresses.grpc, access)
            with pytest.raises(kind):
                await teachers.start(Deadline.after(60))
            await teachers.close()
        rollouts = RolloutFleet(Discovery([rollout.addresses.grpc]), job="label", architecture_fingerprint="")
        with pytest.raises(Unauthenticated):
            await rollouts.start(Deadline.after(60))
        await rollouts.close()


async def test_a_job_survives_that_its_token_is_exchanged_on_the_server_first(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", JOB)
    mine = tmp_path / "mine.token"
    mine.write_text(JOB)
    async with running_teacher(tmp_path, server={"auth": {"tokens": str(path)}}) as teacher:
        teachers = fleet(teacher.addresses.grpc, AccessConfig(token_file=mine))
        await teachers.start(Deadline.after(10))
        write_tokens(path, OTHER)
        asked = asyncio.create_task(teachers.ask([sequence(9)], Deadline.after(30), teachers.weight_version))
        await asyncio.wait({asked}, timeout=0.3)
        assert not asked.done()  # it is refused, and goes on trying
        mine.write_text(OTHER + "\n")
        assert (await asked).rows_RD.equal(expected_rows([sequence(9)]))
        await teachers.close()


async def test_a_slot_is_given_back_although_the_token_is_exchanged_here_first(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", JOB)
    mine = tmp_path / "mine.token"
    mine.write_text(JOB)
    server = {"auth": {"tokens": str(path)}}
    async with running_teacher(tmp_path, server=server, slab={"slots": 1, "slots_per_session": 1}) as teacher:
        teachers = fleet(teacher.addresses.grpc, AccessConfig(token_file=mine))
        await teachers.start(Deadline.after(10))
        mine.write_text(OTHER)
        asked = asyncio.create_task(teachers.ask([sequence(9)], Deadline.after(10), teachers.weight_version))
        await asyncio.wait({asked}, timeout=0.3)
        assert not asked.done()  # answered, and neither read nor released
        path.write_text(path.read_text() + f"- {{name: job-one, role: job, token: {OTHER}}}\n")
        assert (await asked).rows_RD.equal(expected_rows([sequence(9)]))
        await teachers.close()


async def test_a_server_that_ends_the_stream_for_want_of_a_role_is_left_at_once(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", VIEWER)  # may connect, and not sample
    async with running_rollout(server={"auth": {"tokens": str(path)}}) as rollout:
        access = access_with(VIEWER, tmp_path)
        rollouts = RolloutFleet(
            Discovery([rollout.addresses.grpc]), job="label", architecture_fingerprint="", access=access
        )
        with pytest.raises(PermissionDenied):
            async with asyncio.timeout(10):
                await rollouts.start(Deadline.after(60))
                await rollouts.set_asleep(EVERY_TAG, Deadline.after(60))
                while True:
                    await rollouts.start(Deadline.after(60))
                    await asyncio.sleep(0.01)
        await rollouts.close()


async def test_a_name_that_no_server_takes_is_told_at_once(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher:
        teachers = TeacherFleet(Discovery([teacher.addresses.grpc]), SessionOptions(job="x" * 130, door="stream"))
        with pytest.raises(InvalidRequest, match="has 130 characters"):
            await teachers.start(Deadline.after(60))
        await teachers.close()


async def test_a_job_survives_that_its_token_file_is_empty_while_its_server_is_started_again(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", JOB)
    mine = tmp_path / "mine.token"
    mine.write_text(JOB)
    async with running_teacher(tmp_path, server={"auth": {"tokens": str(path)}}) as teacher:
        port = int(teacher.addresses.grpc.rpartition(":")[2])
        teachers = fleet(teacher.addresses.grpc, AccessConfig(token_file=mine))
        await teachers.start(Deadline.after(10))
    mine.write_text("")
    async with running_teacher(tmp_path, server={"auth": {"tokens": str(path)}, "port": port}):
        asked = asyncio.create_task(teachers.ask([sequence(9)], Deadline.after(30), teachers.weight_version))
        await asyncio.wait({asked}, timeout=1)
        assert not asked.done()
        mine.write_text(JOB)
        assert (await asked).rows_RD.equal(expected_rows([sequence(9)]))
        await teachers.close()


async def test_a_job_that_is_no_operator_may_wake_nobody_and_works_all_the_same(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", JOB, OPERATOR)
    async with running_teacher(tmp_path, server={"auth": {"tokens": str(path)}}) as teacher:
        teachers = fleet(teacher.addresses.grpc, access_with(JOB, tmp_path))
        await teachers.start(Deadline.after(10))
        await teachers.set_asleep(frozenset(), Deadline.after(10))  # what a trainer does when it starts
        await teachers.ask([sequence(9)], Deadline.after(10), teachers.weight_version)
        with pytest.raises(PermissionDenied):
            await teachers.set_asleep(EVERY_TAG, Deadline.after(10))
        await teachers.close()


@pytest.mark.parametrize(
    ("token", "refusal", "words"),
    [
        (JOB, PermissionDenied, "UpdateWeights needs role operator; job-one has role job"),
        ("wrong-token-of-nobody", DeadlineExpired, "was not taken within 1 s"),
    ],
)
async def test_only_operators_bring_new_weights(
    tmp_path: Path, token: str, refusal: type[Exception], words: str
) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", JOB, OPERATOR)
    weights = made_up_weights()

    def send(address: str, access: AccessConfig) -> None:
        with WeightSender([address], bucket_bytes=2**16, access=access, deadline_s=1) as sender:
            sender.publish(1, FINGERPRINT, weights)

    async with running_rollout(server={"auth": {"tokens": str(path)}}) as rollout:
        address = rollout.addresses.grpc
        with pytest.raises(refusal, match=words):
            await asyncio.to_thread(send, address, access_with(token, tmp_path))
        await asyncio.to_thread(send, address, access_with(OPERATOR, tmp_path))
        client = await RolloutClient.connect(address, job="label", access=access_with(JOB, tmp_path))
        assert client.weight_version == 1
        await client.close()


def made_up_weights() -> Weights:
    """Some that the fake engine takes."""
    tensors = {"embed.weight": torch.zeros(60, 8), "norm.weight": torch.zeros(8)}
    listed: Any = [
        (TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DType.FLOAT32), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    return listed
