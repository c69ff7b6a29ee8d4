"""Messages between broker and door survive the trip, and nothing else is taken for one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdmesh.handles.slab.messages import RECEIVE_BYTES, VERSION, Op, Reply, Request, Status

U32 = st.integers(0, 2**32 - 1)
SECRET = st.binary(min_size=16, max_size=16)


@given(op=st.sampled_from(Op), segment=U32, epoch=U32, token=SECRET)
def test_request_survives(op: Op, segment: int, epoch: int, token: bytes) -> None:
    request = Request(op, segment, epoch, token)
    assert len(request.pack()) == 28
    assert Request.unpack(request.pack()) == request


@given(status=st.sampled_from(Status), size_bytes=st.integers(0, 2**64 - 1), nonce=SECRET)
def test_reply_survives(status: Status, size_bytes: int, nonce: bytes) -> None:
    reply = Reply(status, size_bytes, nonce)
    assert len(reply.pack()) == 32
    assert Reply.unpack(reply.pack()) == reply


def test_bytes_of_version_1_are_those_that_its_other_releases_speak() -> None:
    assert VERSION == 1
    assert [(op.name, op.value) for op in Op] == [("HELLO", 1), ("CLAIM", 2), ("RELEASE", 3)]
    assert [(status.name, status.value) for status in Status] == [("OK", 0), ("GONE", 1)]
    token = bytes(range(16))
    claim = Request(Op.CLAIM, segment=5, epoch=0x0102, token=token)
    assert claim.pack() == bytes([2, 0, 0, 0, 5, 0, 0, 0, 2, 1, 0, 0]) + token
    assert Reply(Status.GONE, size_bytes=0x0102, nonce=token).pack() == bytes([1, *[0] * 7, 2, 1, *[0] * 6]) + token


GARBAGE = st.binary(max_size=RECEIVE_BYTES) | st.binary(min_size=28, max_size=28) | st.binary(min_size=32, max_size=32)


@given(message=GARBAGE)
def test_garbage_is_no_message(message: bytes) -> None:
    request, reply = Request.unpack(message), Reply.unpack(message)
    assert request is None or len(message) == 28
    assert reply is None or len(message) == 32
