"""Chunks written by hand are the protobuf messages that they claim to be."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.errors import InvalidRequest, Unavailable
from kdmesh.rpc.teachers import raw_chunk
from kdmesh.v1.teacher_pb2 import ReadHandleChunk

SIZES = st.sampled_from([1, 2, 127, 128, 129, 16383, 16384, 16385, 2**20, raw_chunk.MAX_BYTES])


def chunk(data: bytes, offset_bytes: int = 0) -> ReadHandleChunk:
    return ReadHandleChunk(data=data, checksum=xxhash.xxh3_64_intdigest(data, seed=offset_bytes))


@given(SIZES)
def test_protobuf_writes_the_same_bytes(size: int) -> None:
    data = bytes(size)
    encoded = raw_chunk.encode(memoryview(data), offset_bytes=7)
    assert encoded == chunk(data, 7).SerializeToString()
    assert raw_chunk.decode(encoded, offset_bytes=7) == data


def test_decoding_copies_nothing() -> None:
    message = raw_chunk.encode(memoryview(b"abc"), offset_bytes=0)
    assert raw_chunk.decode(message, offset_bytes=0).obj is message


@given(st.binary(max_size=64))
def test_garbage_is_refused_or_is_exactly_one_chunk(message: bytes) -> None:
    try:
        data = raw_chunk.decode(message, offset_bytes=0)
    except (InvalidRequest, Unavailable):
        return
    assert ReadHandleChunk.FromString(message) == chunk(bytes(data))


@given(st.binary(min_size=1, max_size=40), st.data())
def test_no_byte_of_a_chunk_can_change_unnoticed(data: bytes, draw: st.DataObject) -> None:
    message = bytearray(raw_chunk.encode(memoryview(data), offset_bytes=3))
    message[draw.draw(st.integers(0, len(message) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises((InvalidRequest, Unavailable)):
        raw_chunk.decode(bytes(message), offset_bytes=3)


def test_a_chunk_from_another_place_is_noticed() -> None:
    message = raw_chunk.encode(memoryview(b"abc"), offset_bytes=3)
    with pytest.raises(Unavailable, match="3 bytes at offset 0 came with a wrong checksum") as refused:
        raw_chunk.decode(message, offset_bytes=0)
    assert refused.value.retry_after_s == 0


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
        chunk(bytes(raw_chunk.MAX_BYTES + 1)).SerializeToString(),
        ReadHandleChunk(data=b"abc").SerializeToString(),
        b"\x0a\x01a\x19" + bytes(8),
    ],
    ids=[
        *("empty", "no length", "no data", "short", "long", "another field", "endless length", "too large"),
        *("no checksum", "another last field"),
    ],
)
def test_what_is_not_one_chunk_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequest):
        raw_chunk.decode(message, offset_bytes=0)
