"""A job tries by every means that a client has to read another's rows, and gets none of them."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import httpx
import pytest
import torch

from kdmesh.errors import HandleGone
from kdmesh.handles.doors.shm import ShmDoor
from kdmesh.handles.slab.messages import VERSION, Op, Reply, Request, Status
from kdmesh.rpc import codec
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.retry import Deadline
from kdmesh.types import Handle
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherStub
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import RunningTeacher, running_teacher

FORGED = b"\x01" * 16


@dataclass(frozen=True)
class Client:
    """A session and the bare protocol: it asks for what it likes."""

    stub: TeacherStub
    opened: pb.OpenSessionResponse

    @property
    def session(self) -> bytes:
        return self.opened.session

    async def prefill(self, seed: int) -> Handle:
        model = await self.stub.Describe(pb.DescribeRequest())
        call = self.stub.Prefill()
        await call.write(
            pb.PrefillRequest(
                session=self.session,
                request_id=1,
                sequences=codec.sequences_to_wire([sequence(9, seed=seed)]),
                model_fingerprint=model.model_fingerprint,
            )
        )
        await call.done_writing()
        (reply,) = [reply async for reply in call]
        return codec.handle_from_wire(reply.result.rows)

    async def read(self, session: bytes, handle: Handle) -> bytes:
        request = pb.ReadHandleRequest(session=session, handle=codec.handle_to_wire(handle))
        return b"".join([chunk.data async for chunk in self.stub.ReadHandle(request)])

    async def refused(self, session: bytes, handle: Handle) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.read(session, handle)
        assert error.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
        assert not handle.token or handle.token.hex() not in str(error.value.details())

    async def map(self, handle: Handle) -> bytes:
        """The bytes as the shared-memory door shows them."""
        door = await ShmDoor.connect(Path(self.opened.broker_socket), self.session, self.opened.node_nonce)
        try:
            return bytes((await door.fetch(handle)).numpy().tobytes())
        finally:
            door.close()

    async def release(self, session: bytes, handle: Handle) -> None:
        await self.stub.Release(pb.ReleaseRequest(session=session, handles=[codec.handle_to_wire(handle)]))


@asynccontextmanager
async def client(teacher: RunningTeacher, job: str) -> AsyncIterator[Client]:
    async with open_channel(teacher.addresses.grpc) as channel:
        stub = TeacherStub(channel)
        yield Client(stub, await stub.OpenSession(pb.OpenSessionRequest(job=job)))


@contextmanager
def broker_socket(of: Client) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(of.opened.broker_socket)
        sock.setblocking(False)
        yield sock


async def says(sock: socket.socket, request: Request) -> tuple[Reply | None, list[int]]:
    """The broker's reply, None when it hangs up, and descriptors that came along."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, request.pack())
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        async with asyncio.timeout(5):
            await ready.wait()
    finally:
        loop.remove_reader(sock)
    message, fds, _, _ = socket.recv_fds(sock, 64, 1)
    return Reply.unpack(message), fds


def bytes_of(seed: int) -> bytes:
    return bytes(expected_rows([sequence(9, seed=seed)]).numpy().tobytes())


async def states(teacher: RunningTeacher) -> dict[str, int]:
    async with httpx.AsyncClient() as http:
        slab = (await http.get(f"http://{teacher.addresses.rest}/v1/slab")).json()
    return {state: count for state, count in slab["slots"].items() if count}


@asynccontextmanager
async def victim_and_thief(directory: Path, *, slots: int = 4) -> AsyncIterator[tuple[RunningTeacher, Client, Client]]:
    async with (
        running_teacher(directory, slab={"slots": slots}, server={"drain_s": 0}) as teacher,
        client(teacher, "victim") as victim,
        client(teacher, "thief") as thief,
    ):
        yield teacher, victim, thief


async def test_handle_of_another_is_read_by_no_stream(tmp_path: Path) -> None:
    async with victim_and_thief(tmp_path) as (_, victim, thief):
        handle = await victim.prefill(seed=1)
        own = await thief.prefill(seed=2)
        for stolen in (
            handle,  # as it is, with the thief's session
            replace(handle, token=own.token),
            replace(handle, token=FORGED),
            replace(handle, token=b""),
            replace(own, segment=handle.segment),
            replace(own, token=handle.token),
            replace(handle, epoch=handle.epoch + 1),
            replace(handle, epoch=0),
            replace(handle, segment=2**31),
        ):
            await thief.refused(thief.session, stolen)
        for session in (b"", FORGED, victim.session[:8], victim.session[:-1] + b"\0", b"victim"):
            await thief.refused(session, handle)
        assert await victim.read(victim.session, handle) == bytes_of(1)


async def test_own_handle_is_stretched_over_no_other_bytes(tmp_path: Path) -> None:
    async with victim_and_thief(tmp_path) as (_, victim, thief):
        await victim.prefill(seed=1)
        own = await thief.prefill(seed=2)
        for stretched in (
            replace(own, offset_bytes=8192),
            replace(own, rows=own.rows * 100),
            replace(own, cols=own.cols * 2),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await thief.read(thief.session, stretched)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_released_and_replayed_handles_read_nothing_of_who_has_the_slot_next(tmp_path: Path) -> None:
    async with victim_and_thief(tmp_path, slots=1) as (_, victim, thief):
        own = await thief.prefill(seed=2)
        await thief.release(thief.session, own)
        handle = await victim.prefill(seed=1)
        assert (handle.segment, handle.epoch) == (own.segment, own.epoch)
        await thief.refused(thief.session, own)
        await thief.refused(victim.session[:-1] + b"\0", own)
        with pytest.raises(HandleGone):
            await thief.map(own)
        assert await victim.read(victim.session, handle) == bytes_of(1)


async def test_broker_lends_nothing_to_a_guessed_session_or_of_another(tmp_path: Path) -> None:
    async with victim_and_thief(tmp_path) as (_, victim, thief):
        handle = await victim.prefill(seed=1)
        for guess in (FORGED, bytes(16), handle.token):
            with broker_socket(thief) as sock:
                reply, fds = await says(sock, Request(Op.HELLO, VERSION, 0, guess))
                assert (reply is None or reply.status is Status.GONE) and not fds
                reply, fds = await says(sock, Request(Op.CLAIM, handle.segment, handle.epoch, handle.token))
                assert (reply is None or reply.status is Status.GONE) and not fds
        with broker_socket(thief) as sock:
            reply, _ = await says(sock, Request(Op.HELLO, VERSION, 0, thief.session))
            assert reply is not None and reply.status is Status.OK
            for epoch in (handle.epoch, handle.epoch + 1, 0):
                for token in (handle.token, FORGED, victim.session):
                    reply, fds = await says(sock, Request(Op.CLAIM, handle.segment, epoch, token))
                    assert reply is not None and reply.status is Status.GONE and not fds
            reply, _ = await says(sock, Request(Op.HELLO, VERSION, 0, FORGED))  # another one, on the same socket
            assert reply is None
        assert await victim.read(victim.session, handle) == bytes_of(1)


async def test_slot_of_another_is_released_by_nobody_else(tmp_path: Path) -> None:
    async with victim_and_thief(tmp_path) as (teacher, victim, thief):
        handle = await victim.prefill(seed=1)
        for stolen in (handle, replace(handle, token=FORGED)):
            await thief.release(thief.session, stolen)
        with broker_socket(thief) as sock:
            await says(sock, Request(Op.HELLO, VERSION, 0, thief.session))
            sock.send(Request(Op.RELEASE, handle.segment, handle.epoch, handle.token).pack())
            await says(sock, Request(Op.CLAIM, handle.segment, handle.epoch, FORGED))  # the broker has seen both
        await thief.stub.CloseSession(pb.CloseSessionRequest(session=thief.session))
        assert await states(teacher) == {"free": 3, "ready": 1}
        assert await victim.read(victim.session, handle) == bytes_of(1)


async def test_memory_that_one_job_has_mapped_is_never_written_for_another(tmp_path: Path) -> None:
    """A client that keeps its mapping after the release looks into the slot for ever."""
    async with victim_and_thief(tmp_path, slots=1) as (_, victim, thief):
        own = await thief.prefill(seed=2)
        with broker_socket(thief) as sock:
            await says(sock, Request(Op.HELLO, VERSION, 0, thief.session))
            reply, (fd,) = await says(sock, Request(Op.CLAIM, own.segment, own.epoch, own.token))
            assert reply is not None
            kept = mmap.mmap(fd, reply.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            os.close(fd)
            await thief.release(thief.session, own)
            handle = await victim.prefill(seed=1)  # waits for new memory of the only slot
            assert (handle.segment, handle.epoch) == (own.segment, own.epoch + 1)
            assert await victim.map(handle) == bytes_of(1)
            assert kept[: own.size_bytes] == bytes_of(2)
            kept.close()


async def test_jobs_that_share_too_few_slots_get_right_rows_in_turn(tmp_path: Path) -> None:
    async with (
        running_teacher(tmp_path, slab={"slots": 2}) as teacher,
        teacher.client(job="one", door="shm") as one,
        teacher.client(job="two", door="shm") as two,
    ):
        for seed in range(6):
            for each in (one, two, one):
                asked = [sequence(9, seed=seed)]
                rows = await each.prefill(asked, Deadline.after(10))
                assert torch.equal(rows.rows_RD, expected_rows(asked))
                del rows
