"""Bearer tokens: who is let in, to do what, and how that changes while servers and clients run."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import ConfigError, HandleGone, PermissionDenied, RpcError, Unauthenticated
from kdmesh.rpc.calls import our_errors
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts.client import RolloutClient
from kdmesh.types import EVERY_TAG
from kdmesh.v1 import common_pb2, rollout_pb2, weights_pb2
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.v1.teacher_pb2_grpc import TeacherStub
from tests.support.identities import JOB, OPERATOR, OTHER, VIEWER, access_with, teacher_client, write_tokens
from tests.support.rollout_server import running_rollout
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher


@asynccontextmanager
async def guarded(directory: Path, *tokens: str, **server: Any) -> AsyncIterator[RunningTeacher]:
    """A teacher that knows these tokens."""
    path = write_tokens(directory / "tokens.yaml", *tokens)
    async with running_teacher(directory, server={"auth": {"tokens": str(path)}, **server}) as teacher:
        yield teacher


async def metrics(teacher: RunningTeacher) -> str:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {VIEWER}"}) as http:
        return (await http.get(f"http://{teacher.addresses.rest}/metrics")).text


async def asks_for_rows(client: Any) -> None:
    """Raises what the server answers, and compares the rows."""
    wanted = [sequence(9)]
    rows = await client.prefill(wanted, Deadline.after(10))
    assert torch.equal(rows.rows_RD, expected_rows(wanted))


async def test_a_job_with_a_token_is_served_under_the_name_that_the_server_knows(tmp_path: Path) -> None:
    async with guarded(tmp_path, JOB, VIEWER) as teacher:
        async with teacher_client(teacher.addresses.grpc, access_with(JOB, tmp_path), job="whatever") as client:
            await asks_for_rows(client)
        said = await metrics(teacher)
    assert 'kdmesh_teacher_tokens_total{kdmesh_job="job-one"} 9.0' in said
    assert "whatever" not in said


@pytest.mark.parametrize("token", ["", "wrong-token-of-nobody", JOB[:-1], f"{JOB}x"])
async def test_a_missing_or_wrong_token_is_refused_and_never_repeated(tmp_path: Path, token: str) -> None:
    access = access_with(token, tmp_path) if token else OPEN_ACCESS
    async with guarded(tmp_path, JOB, VIEWER) as teacher:
        with pytest.raises(Unauthenticated) as refusal:
            async with teacher_client(teacher.addresses.grpc, access):
                pass
        said = await metrics(teacher)
    assert "bearer token" in str(refusal.value)
    assert not token or token not in str(refusal.value)
    assert 'kdmesh_teacher_refused_callers_total{reason="Unauthenticated"} 1.0' in said


async def test_a_token_may_be_known_by_its_digest_alone(tmp_path: Path) -> None:
    entry = {"name": "job-one", "role": "job", "sha256": hashlib.sha256(JOB.encode()).hexdigest()}
    path = tmp_path / "tokens.json"
    path.write_text(yaml.safe_dump({"tokens": [entry]}))
    async with running_teacher(tmp_path, server={"auth": {"tokens": str(path)}}) as teacher:
        async with teacher_client(teacher.addresses.grpc, access_with(JOB, tmp_path)) as client:
            await asks_for_rows(client)
        with pytest.raises(Unauthenticated):  # the digest is not the token
            async with teacher_client(teacher.addresses.grpc, access_with(entry["sha256"], tmp_path)):
                pass


EVERY_TEACHER_RPC = {method.name for method in pb.DESCRIPTOR.services_by_name["Teacher"].methods}
ALLOWED = {
    # Role of the caller: rpcs that are answered, or fail for another reason than the role.
    VIEWER: {"Describe"},
    JOB: EVERY_TEACHER_RPC - {"Sleep", "Wake", "UpdateWeights"},
}


@pytest.mark.parametrize("token", [VIEWER, JOB, OPERATOR])
async def test_a_teacher_lets_each_role_do_what_is_its_own(tmp_path: Path, token: str) -> None:
    session = b"\x01" * 16
    async with (
        guarded(tmp_path, token) as teacher,
        open_channel(teacher.addresses.grpc, access_with(token, tmp_path)) as channel,
    ):
        stub = TeacherStub(channel)
        calls: dict[str, Any] = {
            "Describe": lambda: stub.Describe(pb.DescribeRequest()),
            "OpenSession": lambda: stub.OpenSession(pb.OpenSessionRequest()),
            "KeepAlive": lambda: stub.KeepAlive(pb.KeepAliveRequest(session=session)),
            "CloseSession": lambda: stub.CloseSession(pb.CloseSessionRequest(session=session)),
            "Prefill": lambda: _first(stub.Prefill(), pb.PrefillRequest(session=session)),
            "PutImages": lambda: stub.PutImages(common_pb2.PutImagesRequest(session=session)),
            "FindCached": lambda: stub.FindCached(pb.FindCachedRequest(session=session)),
            "CarryRows": lambda: _first(stub.CarryRows(), pb.CarryRowsRequest(begin=pb.BeginCarrying(session=session))),
            "Release": lambda: stub.Release(pb.ReleaseRequest(session=session)),
            "LocateMemory": lambda: stub.LocateMemory(pb.LocateMemoryRequest(session=session)),
            "GetHead": lambda: stub.GetHead(pb.GetHeadRequest(session=session)),
            "ReadHandle": lambda: _first(stub.ReadHandle(pb.ReadHandleRequest(session=session))),
            "Sleep": lambda: stub.Sleep(common_pb2.SleepRequest()),
            "Wake": lambda: stub.Wake(common_pb2.WakeRequest()),
            "UpdateWeights": lambda: _first(stub.UpdateWeights(), weights_pb2.UpdateWeightsRequest()),
        }
        assert set(calls) == EVERY_TEACHER_RPC
        assert await _permitted(teacher.addresses.grpc, calls) == ALLOWED.get(token, set(calls))


@pytest.mark.parametrize("token", [VIEWER, JOB, OPERATOR])
async def test_a_rollout_server_lets_each_role_do_what_is_its_own(tmp_path: Path, token: str) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", token)
    async with (
        running_rollout(server={"auth": {"tokens": str(path)}}) as server,
        open_channel(server.addresses.grpc, access_with(token, tmp_path)) as channel,
    ):
        stub = RolloutStub(channel)
        calls: dict[str, Any] = {
            "Describe": lambda: stub.Describe(rollout_pb2.DescribeRolloutRequest()),
            "Generate": lambda: _first(stub.Generate(), rollout_pb2.GenerateRequest()),
            "PutImages": lambda: stub.PutImages(common_pb2.PutImagesRequest()),
            "Sleep": lambda: stub.Sleep(common_pb2.SleepRequest()),
            "Wake": lambda: stub.Wake(common_pb2.WakeRequest()),
            "UpdateWeights": lambda: _first(stub.UpdateWeights(), weights_pb2.UpdateWeightsRequest()),
        }
        assert set(calls) == {method.name for method in rollout_pb2.DESCRIPTOR.services_by_name["Rollout"].methods}
        allowed = {VIEWER: {"Describe"}, JOB: {"Describe", "Generate", "PutImages"}}.get(token, set(calls))
        assert await _permitted(server.addresses.grpc, calls) == allowed


async def _first(call: Any, request: Any = None) -> None:
    if request is not None:
        # Given an iterator, gRPC cancels a call that was refused before it was written, and the refusal is lost.
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await call.write(request)
    await call.read()


async def _permitted(address: str, calls: dict[str, Any]) -> set[str]:
    permitted = set()
    for name, call in calls.items():
        try:
            with our_errors(address):
                await call()
        except PermissionDenied as refusal:
            assert name in str(refusal)
            continue
        except RpcError:
            pass
        permitted.add(name)
    return permitted


async def test_health_is_open_and_reflection_needs_a_viewer(tmp_path: Path) -> None:
    async with guarded(tmp_path, VIEWER) as teacher:
        async with open_channel(teacher.addresses.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            checked = await health.Check(health_pb2.HealthCheckRequest())
            assert checked.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(Unauthenticated), our_errors("teacher"):
                await _services(channel)
        async with open_channel(teacher.addresses.grpc, access_with(VIEWER, tmp_path)) as channel:
            assert "kdmesh.v1.Teacher" in await _services(channel)


async def _services(channel: grpc.aio.Channel) -> str:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    return str([str(answer) async for answer in stub.ServerReflectionInfo(iter([asked]))])


def _names_a_session(message: Any) -> bool:
    """The message, or a part of it."""
    return "session" in message.fields_by_name or any(
        field.message_type is not None and _names_a_session(field.message_type) for field in message.fields
    )


async def test_a_session_of_one_job_is_unknown_to_every_other(tmp_path: Path) -> None:
    async with guarded(tmp_path, JOB, OTHER, groups=True) as teacher:
        address = teacher.addresses.grpc
        async with (
            teacher_client(address, access_with(JOB, tmp_path)) as owner,
            open_channel(address, access_with(OTHER, tmp_path)) as channel,
        ):
            stub = TeacherStub(channel)
            stolen = owner._session
            rpcs: dict[str, Any] = {
                "KeepAlive": lambda session: stub.KeepAlive(pb.KeepAliveRequest(session=session)),
                "Prefill": lambda session: _first(stub.Prefill(), pb.PrefillRequest(session=session)),
                "PutImages": lambda session: stub.PutImages(common_pb2.PutImagesRequest(session=session)),
                "FindCached": lambda session: stub.FindCached(pb.FindCachedRequest(session=session)),
                "Release": lambda session: stub.Release(pb.ReleaseRequest(session=session)),
                "LocateMemory": lambda session: stub.LocateMemory(pb.LocateMemoryRequest(session=session)),
                "CarryRows": lambda session: _first(
                    stub.CarryRows(), pb.CarryRowsRequest(begin=pb.BeginCarrying(session=session))
                ),
                "GetHead": lambda session: stub.GetHead(pb.GetHeadRequest(session=session)),
                "ReadHandle": lambda session: _first(stub.ReadHandle(pb.ReadHandleRequest(session=session))),
            }
            service = pb.DESCRIPTOR.services_by_name["Teacher"]
            naming = {method.name for method in service.methods if _names_a_session(method.input_type)}
            # The first succeeds whatever it names; the other's session is one of the sender's own.
            assert set(rpcs) == naming - {"CloseSession", "UpdateWeights"}
            for rpc in rpcs.values():
                said = []
                for session in (stolen, b"\x01" * 16):
                    with pytest.raises(HandleGone) as refusal, our_errors(address):
                        await rpc(session)
                    said.append(str(refusal.value))
                assert said[0] == said[1]
            await stub.CloseSession(pb.CloseSessionRequest(session=stolen))
            await asks_for_rows(owner)  # its session was not closed


async def test_a_revoked_token_ends_its_streams_and_a_new_one_works_without_a_restart(tmp_path: Path) -> None:
    async with guarded(tmp_path, JOB) as teacher:
        async with teacher_client(teacher.addresses.grpc, access_with(JOB, tmp_path)) as client:
            await asks_for_rows(client)
            write_tokens(tmp_path / "tokens.yaml", OTHER)
            with pytest.raises(Unauthenticated, match="revoked"):
                await asks_for_rows(client)
            assert isinstance(await client.wait_lost(), Unauthenticated)
        async with teacher_client(teacher.addresses.grpc, access_with(OTHER, tmp_path)) as client:
            await asks_for_rows(client)


async def test_a_client_reads_its_token_file_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.token"
    path.write_text(JOB)
    async with (
        guarded(tmp_path, JOB, OTHER) as teacher,
        open_channel(teacher.addresses.grpc, AccessConfig(token_file=path)) as channel,
    ):
        stub = TeacherStub(channel)
        session = (await stub.OpenSession(pb.OpenSessionRequest())).session
        await stub.KeepAlive(pb.KeepAliveRequest(session=session))
        path.write_text(OTHER + "\n")
        with pytest.raises(HandleGone), our_errors("teacher"):  # it is another job now
            await stub.KeepAlive(pb.KeepAliveRequest(session=session))


async def test_a_secret_whose_link_is_swapped_is_read_again(tmp_path: Path) -> None:
    for version, token in (("1", JOB), ("2", OTHER)):
        (tmp_path / version).mkdir()
        write_tokens(tmp_path / version / "tokens.yaml", token)
    link = tmp_path / "..data"
    link.symlink_to("1")
    (tmp_path / "tokens.yaml").symlink_to("..data/tokens.yaml")
    auth = {"tokens": str(tmp_path / "tokens.yaml")}
    async with running_teacher(tmp_path, server={"auth": auth}) as teacher:
        (tmp_path / "next").symlink_to("2")
        (tmp_path / "next").rename(link)
        with pytest.raises(Unauthenticated):
            async with teacher_client(teacher.addresses.grpc, access_with(JOB, tmp_path)):
                pass
        async with teacher_client(teacher.addresses.grpc, access_with(OTHER, tmp_path)) as client:
            await asks_for_rows(client)


@pytest.mark.parametrize("text", ["tokens: [", f"tokens: [{{name: x, role: king, token: {OTHER}}}]", None])
async def test_a_broken_file_keeps_the_tokens_from_before_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    path = tmp_path / "tokens.yaml"
    async with guarded(tmp_path, JOB, VIEWER) as teacher:
        at_first = await metrics(teacher)
        with caplog.at_level(logging.ERROR):
            path.unlink() if text is None else path.write_text(text)
            async with teacher_client(teacher.addresses.grpc, access_with(JOB, tmp_path)) as client:
                await asks_for_rows(client)
        said = await metrics(teacher)
    (record,) = [r for r in caplog.records if r.name == "kdmesh.auth.watched"]
    assert record.__dict__["files"] == [str(path)]
    assert OTHER not in record.__dict__["reason"]
    # From 0 on: Prometheus' increase() of a series that begins with 1 is none.
    assert 'kdmesh_teacher_unusable_files_total{key="tokens"} 0.0' in at_first
    assert 'kdmesh_teacher_unusable_files_total{key="tokens"} 1.0' in said


async def test_a_rollout_server_knows_a_job_by_its_token(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", JOB)
    async with running_rollout(server={"auth": {"tokens": str(path)}}) as server:
        address = server.addresses.grpc
        with pytest.raises(Unauthenticated):
            await RolloutClient.connect(address, job="label")
        client = await RolloutClient.connect(address, job="label", access=access_with(JOB, tmp_path))
        with pytest.raises(PermissionDenied, match="Sleep needs role operator; job-one has role job"):
            await client.sleep(EVERY_TAG, drain_s=1)
        await client.close()


async def test_a_token_leaves_this_machine_only_where_something_encrypts_it(tmp_path: Path) -> None:
    access = access_with(JOB, tmp_path)
    with pytest.raises(ConfigError, match="the token would travel in the clear") as refusal:
        open_channel("teacher.example:50051", access)
    assert JOB not in str(refusal.value)
    for allowed in (access.model_copy(update={"plaintext_token": True}), OPEN_ACCESS):
        await open_channel("teacher.example:50051", allowed).close()
