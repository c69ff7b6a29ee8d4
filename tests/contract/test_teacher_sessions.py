"""Sessions and handles: whose they are, and when they end."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest
import torch

from kdmesh.errors import Unavailable
from kdmesh.rpc import codec
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.fleet import TeacherFleet
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherStub
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher

FORGED = b"\x01" * 16


class RawClient:
    """The bare protocol, without anything that keeps it right."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = TeacherStub(channel)
        self.session = b""

    async def open(self) -> None:
        self.session = (await self.stub.OpenSession(pb.OpenSessionRequest(job="raw"))).session

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """The session does not end meanwhile."""
        is_over = False

        async def keep_alive() -> None:
            while not is_over:
                await self.stub.KeepAlive(pb.KeepAliveRequest(session=self.session))

        async with asyncio.TaskGroup() as speaking:
            speaking.create_task(keep_alive())
            try:
                yield
            finally:
                is_over = True

    async def request(self, *, session: bytes | None = None, num_tokens: int = 9) -> pb.PrefillRequest:
        return pb.PrefillRequest(
            session=self.session if session is None else session,
            request_id=1,
            sequences=codec.sequences_to_wire([sequence(num_tokens)]),
            model_fingerprint=(await self.stub.Describe(pb.DescribeRequest())).model_fingerprint,
        )

    async def prefill(self, *, session: bytes | None = None, num_tokens: int = 9) -> pb.PrefillReply:
        call = self.stub.Prefill()
        await call.write(await self.request(session=session, num_tokens=num_tokens))
        await call.done_writing()
        replies = [reply async for reply in call]
        assert len(replies) == 1
        return replies[0]

    async def read(self, request: pb.ReadHandleRequest) -> bytes:
        return b"".join([chunk.data async for chunk in self.stub.ReadHandle(request)])


@asynccontextmanager
async def raw_client(teacher: RunningTeacher) -> AsyncIterator[RawClient]:
    async with open_channel(teacher.addresses.grpc) as channel:
        client = RawClient(channel)
        await client.open()
        yield client
        await client.stub.CloseSession(pb.CloseSessionRequest(session=client.session))


def code(failure: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> grpc.StatusCode:
    return failure.value.code()


async def test_the_simplest_client_gets_its_answer(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, raw_client(teacher) as client:
        reply = await client.prefill()  # it stops writing before the answer comes
        data = await client.read(pb.ReadHandleRequest(session=client.session, handle=reply.result.rows))
        assert torch.equal(
            torch.frombuffer(bytearray(data), dtype=torch.float32).view(8, 8), expected_rows([sequence(9)])
        )


async def test_broken_stream_cancels_its_requests_though_the_session_lives(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, raw_client(teacher) as client:
        teacher.engine.hold()
        call = client.stub.Prefill()
        await call.write(await client.request())
        await asyncio.to_thread(teacher.engine.wait_entered)
        await call.write(await client.request())
        async with httpx.AsyncClient() as http:

            async def until_waiting(count: int) -> dict[str, Any]:
                while True:
                    slab = (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()
                    if slab["waiting"]["requests"] == count:
                        return cast("dict[str, Any]", slab)

            await until_waiting(1)
            call.cancel()
            await until_waiting(0)
            teacher.engine.let_go()
            while (await until_waiting(0))["slots"]["free"] != 4:
                pass
        assert (await client.prefill()).WhichOneof("outcome") == "result"


async def test_unknown_session_is_not_found_everywhere(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, raw_client(teacher) as client:
        handle = (await client.prefill()).result.rows
        for call in (
            client.stub.KeepAlive(pb.KeepAliveRequest(session=FORGED)),
            client.stub.GetHead(pb.GetHeadRequest(session=FORGED)),
            client.stub.Release(pb.ReleaseRequest(session=FORGED, handles=[handle])),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call
            assert code(failure) is grpc.StatusCode.NOT_FOUND
        for stream in (
            client.prefill(session=FORGED),
            client.read(pb.ReadHandleRequest(session=FORGED, handle=handle)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stream
            assert code(failure) is grpc.StatusCode.NOT_FOUND
        await client.stub.CloseSession(pb.CloseSessionRequest(session=FORGED))


async def test_handle_is_worth_nothing_forged_foreign_or_released(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path) as teacher,
        raw_client(teacher) as owner,
        raw_client(teacher) as thief,
    ):
        handle = (await owner.prefill()).result.rows
        forged = type(handle)()
        forged.CopyFrom(handle)
        forged.token = FORGED
        wrong = [
            pb.ReadHandleRequest(session=thief.session, handle=handle),
            pb.ReadHandleRequest(session=owner.session, handle=forged),
        ]
        for request in wrong:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await owner.read(request)
            assert code(failure) is grpc.StatusCode.NOT_FOUND
        # Another's release changes nothing; the owner's ends it.
        await thief.stub.Release(pb.ReleaseRequest(session=thief.session, handles=[handle]))
        right = pb.ReadHandleRequest(session=owner.session, handle=handle)
        assert len(await owner.read(right)) == 8 * 8 * 4
        await owner.stub.Release(pb.ReleaseRequest(session=owner.session, handles=[handle]))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await owner.read(right)
        assert code(failure) is grpc.StatusCode.NOT_FOUND


async def test_handle_with_another_shape_is_refused(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, raw_client(teacher) as client:
        handle = (await client.prefill()).result.rows
        handle.rows += 1
        with pytest.raises(grpc.aio.AioRpcError, match="9 x 8 float32 at 0; answered was 8 x 8") as failure:
            await client.read(pb.ReadHandleRequest(session=client.session, handle=handle))
        assert code(failure) is grpc.StatusCode.INVALID_ARGUMENT


async def test_silent_session_ends_with_its_requests_and_slots(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, slab={"slots": 1, "lease_s": 0.3}) as teacher, raw_client(teacher) as silent:
        await silent.prefill()  # holds the only slot, and never keeps its session alive
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await silent.prefill()
        assert code(failure) is grpc.StatusCode.NOT_FOUND
        async with teacher.client() as other:
            assert (await other.prefill([sequence(9)], Deadline.after(5))).rows_RD.shape == (8, 8)


async def test_reader_that_stops_reading_keeps_no_slot_past_its_session(tmp_path: Path) -> None:
    large = {"hidden_size": 8192, "max_batch_tokens": 1024}  # more than gRPC ever reads ahead, which is 16 MiB
    async with (
        running_teacher(tmp_path, engine=large, slab={"slots": 1, "slot_mib": 32, "lease_s": 0.6}) as teacher,
        raw_client(teacher) as stalled,
    ):
        async with stalled.kept_alive():  # a slow machine may take longer than the lease for a prefill
            handle = (await stalled.prefill(num_tokens=1000)).result.rows
            reading = stalled.stub.ReadHandle(pb.ReadHandleRequest(session=stalled.session, handle=handle))
            chunks = aiter(reading)
            assert len((await anext(chunks)).data) > 0
        # It goes on in a new session when it has lost its own, whose lease is as short.
        other = TeacherFleet(Discovery([teacher.addresses.grpc]), SessionOptions(job="other", door="stream"))
        try:
            await other.start(Deadline.after(20))
            assert (
                await other.ask([sequence(9)], Deadline.after(20), weight_version=other.model.weight_version)
            ).rows_RD.shape == (8, 8192)
        finally:
            await other.close()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in chunks:
                pass
        assert code(failure) is grpc.StatusCode.NOT_FOUND


async def test_client_keeps_its_session_without_being_used(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, slab={"lease_s": 0.3}) as teacher, teacher.client(door="shm") as client:
        rows = await client.prefill([sequence(9)], Deadline.after(5))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):  # three leases
                await client.wait_lost()
        assert torch.equal(rows.rows_RD, expected_rows([sequence(9)]))
        del rows
        assert (await client.prefill([sequence(9)], Deadline.after(5))).rows_RD.shape == (8, 8)


async def test_client_whose_session_was_closed_notices(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, slab={"lease_s": 0.6}) as teacher,
        teacher.client() as client,
        raw_client(teacher) as other,
    ):
        await other.stub.CloseSession(pb.CloseSessionRequest(session=client._session))
        async with asyncio.timeout(2):
            assert "unknown or its lease has ended" in str(await client.wait_lost())


async def test_a_release_that_the_server_never_heard_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_teacher(tmp_path) as teacher, teacher.client() as client, httpx.AsyncClient() as http:
        send, sent = client._stub.Release, 0

        async def lose_the_first(request: pb.ReleaseRequest, **options: Any) -> pb.ReleaseResponse:
            nonlocal sent
            sent += 1
            if sent == 1:
                raise Unavailable("the server did not answer in time")
            return await send(request, **options)

        monkeypatch.setattr(client._stub, "Release", lose_the_first)
        await client.prefill([sequence(9)], Deadline.after(10))
        async with asyncio.timeout(10):
            while (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()["slots"]["free"] < 4:
                pass  # each look is a round trip through the server's loop
        assert sent == 2


async def test_a_client_whose_process_may_open_no_more_files_gives_its_session_and_slot_back(tmp_path: Path) -> None:
    async with running_teacher(tmp_path) as teacher, httpx.AsyncClient() as http:
        await http.get(f"http://{teacher.addresses.rest}/v1/slab")
        async with teacher.client(door="shm") as client:
            with no_more_files(), pytest.raises(Unavailable, match="no descriptor came; has this process as many open"):
                await client.prefill([sequence(9)], Deadline.after(10))
            assert "no descriptor came" in str(await client.wait_lost())
        async with asyncio.timeout(10):
            while (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()["slots"]["free"] < 4:
                pass  # each look is a round trip through the server's loop


@contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
