"""Messages between broker and door survive the trip, and nothing else is taken for one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdmesh.handles.slab.messages import RECEIVE_BYTES, Op, Reply, Request, Status

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


@given(message=st.binary(max_size=RECEIVE_BYTES))
def test_garbage_is_no_message(message: bytes) -> None:
    request, reply = Request.unpack(message), Reply.unpack(message)
    assert request is None or len(message) == 28
    assert reply is None or len(message) == 32
