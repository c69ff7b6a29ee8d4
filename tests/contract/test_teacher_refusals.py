"""Bad requests are refused before any work, with the value and the rule; garbage never harms the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.rpc import codec
from kdmesh.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from kdmesh.tokens import digest
from kdmesh.v1 import common_pb2
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherStub
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import RunningTeacher, running_teacher

T = TypeVar("T")

FINGERPRINT = "fa4e000000080000003c"
INVALID, MISMATCH = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


class Asker:
    """One session, and requests of any kind in it."""

    def __init__(self, teacher: RunningTeacher, channel: grpc.aio.Channel, session: bytes) -> None:
        self.teacher = teacher
        self.channel = channel
        self.stub = TeacherStub(channel)
        self.session = session

    async def failure(self, *sequences: common_pb2.TokenSequence, fingerprint: str = FINGERPRINT) -> common_pb2.Failure:
        """Why a request of these sequences is refused."""
        self.teacher.engine.batches.clear()
        call = self.stub.Prefill()
        await call.write(
            pb.PrefillRequest(
                session=self.session, request_id=5, sequences=sequences, model_fingerprint=fingerprint, deadline_ms=5000
            )
        )
        reply = await call.read()
        call.cancel()
        assert isinstance(reply, pb.PrefillReply)
        assert reply.request_id == 5
        assert reply.WhichOneof("outcome") == "failure"
        assert not self.teacher.engine.batches
        return reply.failure

    async def is_well(self) -> None:
        """The server still answers."""
        async with self.teacher.client() as client:
            assert client.model.name == "fake"


@pytest_asyncio.fixture
async def asker(tmp_path: Path) -> AsyncIterator[Asker]:
    async with running_teacher(tmp_path) as teacher, open_channel(teacher.addresses.grpc) as channel:
        stub = TeacherStub(channel)
        opened = await stub.OpenSession(pb.OpenSessionRequest(job="asker"))
        yield Asker(teacher, channel, opened.session)
        await stub.CloseSession(pb.CloseSessionRequest(session=opened.session))


def raw(token_ids: list[int], positions: list[int]) -> common_pb2.TokenSequence:
    return common_pb2.TokenSequence(token_ids=token_ids, positions=positions)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ([], "holds no sequence"),
        ([raw([], [0])], "at least 2 tokens"),
        ([raw([1], [0])], "at least 2 tokens"),
        ([raw([1, 2], [])], "no position"),
        ([raw([1, 2], [1])], "position 1 is out of range: a sequence of 2 tokens has the positions 0 to 0"),
        ([raw([1, 2, 3], [1, 0])], "not strictly increasing"),
        ([raw([1, 2, 3], [0, 0])], "not strictly increasing"),
        ([raw([1, 64], [0])], "sequence 0 has token id 64; ids must be below 64"),
        ([raw([1, 2**32 - 1], [0])], "token id 4294967295 exceeds 2147483647"),
        ([raw([1] * 257, [0])], "sequence 0 has 257 tokens; the longest allowed is 256"),
        ([raw([1] * 200, [0])] * 2, "400 tokens over all its sequences; the most allowed is 256"),
    ],
)
async def test_bad_sequences_are_refused(asker: Asker, bad: list[common_pb2.TokenSequence], sentence: str) -> None:
    failure = await asker.failure(*bad)
    assert sentence in failure.message
    assert failure.code == INVALID.value[0]
    assert failure.retry_after_ms == 0


async def test_too_many_sequences_are_refused_before_any_is_looked_at(asker: Asker) -> None:
    """Looking at all that a message holds would hold up everybody's calls for minutes."""
    too_many = [raw([], [])] * 129  # of which each one is bad
    sentence = "129 sequences of at least 2 tokens each; the most tokens allowed are 256"
    failure = await asker.failure(*too_many)
    assert (failure.code, sentence in failure.message) == (INVALID.value[0], True)
    find = pb.FindCachedRequest(session=asker.session, sequences=too_many, model_fingerprint=FINGERPRINT)
    with pytest.raises(grpc.aio.AioRpcError, match=sentence):
        await asker.stub.FindCached(find)


async def test_more_handles_than_a_slab_can_have_are_refused_before_any_is_looked_at(asker: Asker) -> None:
    bad = [common_pb2.Handle()] * 8193
    with pytest.raises(grpc.aio.AioRpcError, match="8193 handles are released at once") as refused:
        await asker.stub.Release(pb.ReleaseRequest(session=asker.session, handles=bad))
    assert refused.value.code() is INVALID


async def test_more_rows_than_a_slot_holds_are_refused(tmp_path: Path) -> None:
    async with running_teacher(tmp_path, slab={"slot_mib": 0.004}) as teacher:
        async with open_channel(teacher.addresses.grpc) as channel:
            opened = await TeacherStub(channel).OpenSession(pb.OpenSessionRequest())
            asker = Asker(teacher, channel, opened.session)
            failure = await asker.failure(*codec.sequences_to_wire([sequence(200)]))
        assert "199 rows over all its sequences; the most allowed is 131" in failure.message


async def test_other_weights_are_refused_before_any_work(asker: Asker) -> None:
    wrong = await asker.failure(raw([1, 2], [0]), fingerprint="0000")
    assert (wrong.code, wrong.message) == (
        MISMATCH.value[0],
        f"the request is for model 0000; this server has {FINGERPRINT}",
    )
    assert "(none named)" in (await asker.failure(raw([1, 2], [0]), fingerprint="")).message
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await asker.stub.OpenSession(pb.OpenSessionRequest(model_fingerprint="0000"))
    assert refused.value.code() is MISMATCH


async def test_message_beyond_the_limit_is_too_large_and_not_busy(asker: Asker) -> None:
    unlimited = (("grpc.max_send_message_length", -1),)
    async with grpc.aio.insecure_channel(asker.teacher.addresses.grpc, options=unlimited) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await TeacherStub(channel).KeepAlive(pb.KeepAliveRequest(session=b"x" * (MAX_MESSAGE_BYTES + 1)))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await asker.is_well()


UNARY = ["Describe", "OpenSession", "KeepAlive", "CloseSession", "Release", "GetHead"]


@pytest.mark.parametrize("method", UNARY)
async def test_bytes_that_are_no_message_are_the_callers_fault(asker: Asker, method: str) -> None:
    call = asker.channel.unary_unary(f"/kdmesh.v1.Teacher/{method}")
    with pytest.raises(grpc.aio.AioRpcError, match="7 bytes that are not a request of") as refused:
        await call(b"\xff" * 7)
    assert refused.value.code() is INVALID
    await asker.is_well()


ALLOWED = {INVALID, grpc.StatusCode.NOT_FOUND, None}


def drawn(strategy: st.SearchStrategy[T], count: int = 80) -> list[T]:
    """So many examples, to be sent to one server."""
    examples: list[T] = []

    @settings(max_examples=count, deadline=None, database=None)
    @given(strategy)
    def collect(example: T) -> None:
        examples.append(example)

    collect()
    return examples


async def status_of(channel: grpc.aio.Channel, method: str, data: bytes) -> grpc.StatusCode | None:
    """How a call with these bytes ends; None when it succeeds."""
    call = channel.stream_stream(f"/kdmesh.v1.Teacher/{method}")()
    try:
        await call.write(data)
        await call.done_writing()
        async for reply in call:
            assert reply or method in ("Release", "KeepAlive")
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


@pytest.mark.parametrize("method", ["Prefill", "ReadHandle", "Release", "GetHead", "KeepAlive"])
async def test_garbage_never_harms_the_server(asker: Asker, method: str) -> None:
    for data in drawn(st.binary(max_size=200)):
        assert await status_of(asker.channel, method, data) in ALLOWED
    await asker.is_well()


NUMBERS = st.integers(0, 70) | st.integers(0, 2**32 - 1)
ANY_SEQUENCES = st.lists(
    st.builds(raw, st.lists(NUMBERS, max_size=5), st.lists(st.integers(0, 5) | NUMBERS, max_size=4)), max_size=3
)


async def test_any_request_gets_rows_or_a_refusal(asker: Asker) -> None:
    call = asker.stub.Prefill()
    answered = 0
    for sequences in drawn(ANY_SEQUENCES | st.just([raw([1, 2, 3], [0, 1])]), 200):
        request = pb.PrefillRequest(
            session=asker.session, request_id=1, sequences=sequences, model_fingerprint=FINGERPRINT
        )
        await call.write(request)
        reply = await call.read()
        assert isinstance(reply, pb.PrefillReply)
        if reply.WhichOneof("outcome") == "failure":
            assert reply.failure.code == INVALID.value[0]
            continue
        answered += 1
        valid = codec.sequences_from_wire(sequences)  # it was a request, then
        assert reply.result.rows.rows == sum(s.num_rows for s in valid)
        assert reply.result.digest == digest(valid)
        await asker.stub.Release(pb.ReleaseRequest(session=asker.session, handles=[reply.result.rows]))
    assert answered
    call.cancel()
    await asker.is_well()


async def test_any_handle_is_read_or_refused(asker: Asker) -> None:
    fields = st.integers(0, 9) | st.integers(0, 2**32 - 1)
    handles = st.builds(
        common_pb2.Handle,
        segment=fields,
        epoch=fields,
        token=st.binary(max_size=20) | st.binary(min_size=16, max_size=16),
        offset_bytes=fields | st.integers(0, 2**64 - 1),
        rows=fields,
        cols=fields,
        dtype=st.sampled_from([0, 1, 2, 3]),
    )
    for handle in drawn(handles):
        read = pb.ReadHandleRequest(session=asker.session, handle=handle).SerializeToString()
        assert await status_of(asker.channel, "ReadHandle", read) in {INVALID, grpc.StatusCode.NOT_FOUND}
        release = pb.ReleaseRequest(session=asker.session, handles=[handle]).SerializeToString()
        assert await status_of(asker.channel, "Release", release) in {INVALID, None}
    await asker.is_well()
