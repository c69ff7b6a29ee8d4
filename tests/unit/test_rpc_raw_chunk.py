"""Chunks written by hand are the protobuf messages that they claim to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.errors import InvalidRequest
from kdmesh.rpc import raw_chunk
from kdmesh.v1.teacher_pb2 import ReadHandleChunk

SIZES = st.sampled_from([1, 2, 127, 128, 129, 16383, 16384, 16385, 2**20, raw_chunk.MAX_BYTES])


@given(SIZES)
def test_protobuf_writes_the_same_bytes(size: int) -> None:
    data = bytes(size)
    encoded = raw_chunk.encode(memoryview(data))
    assert encoded == ReadHandleChunk(data=data).SerializeToString()
    assert raw_chunk.decode(encoded) == data


def test_decoding_copies_nothing() -> None:
    message = raw_chunk.encode(memoryview(b"abc"))
    assert raw_chunk.decode(message).obj is message


@given(st.binary(max_size=64))
def test_garbage_is_refused_or_is_exactly_one_chunk(message: bytes) -> None:
    try:
        data = raw_chunk.decode(message)
    except InvalidRequest:
        return
    assert ReadHandleChunk.FromString(message).data == data
    assert message.endswith(bytes(data))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x0a",
        b"\x0a\x00",
        b"\x0a\x05abc",
        b"\x0a\x01abc",
        b"\x12\x01a",
        b"\x0a\xff\xff\xff\xff\xff\xff",
        ReadHandleChunk(data=bytes(raw_chunk.MAX_BYTES + 1)).SerializeToString(),
    ],
    ids=["empty", "no length", "no data", "short", "long", "another field", "endless length", "too large"],
)
def test_what_is_not_one_chunk_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequest):
        raw_chunk.decode(message)
