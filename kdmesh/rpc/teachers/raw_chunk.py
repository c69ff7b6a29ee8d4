"""Encodes and decodes ReadHandleChunk without a protobuf library: one copy on each side."""

from __future__ import annotations

import xxhash

from kdmesh.errors import InvalidRequest, Unavailable

MAX_BYTES = 2 * 2**20
"""Most data of one chunk."""

GOOD_BYTES = 2**20
"""Data of a chunk that is worth its overhead, for processes that keep freed memory (kdmesh.allocator)."""

_DATA_TAG = b"\x0a"  # field 1, length-delimited
_CHECKSUM_TAG = b"\x11"  # field 2, 8 bytes
_END_BYTES = 9  # the checksum and its tag


def encode(data: memoryview, *, offset_bytes: int) -> bytes:
    """The message that holds `data`, 1 to MAX_BYTES bytes that begin at that offset of what is read."""
    return b"".join((_DATA_TAG, _varint(len(data)), data, _CHECKSUM_TAG, _checksum(data, offset_bytes)))


def decode(message: bytes, *, offset_bytes: int) -> memoryview:
    """The data of a message, as a view into it.

    Raises:
        InvalidRequest: when it is not exactly one data field of 1 to MAX_BYTES bytes and one checksum.
        Unavailable: the checksum is not that of these bytes at this offset.
    """
    if message[:1] != _DATA_TAG:
        raise InvalidRequest(f"a chunk of {len(message)} bytes does not begin with its data field")
    length, shift, start = 0, 0, 1
    for byte in message[1:6]:
        length |= (byte & 0x7F) << shift
        shift += 7
        start += 1
        if byte < 0x80:
            break
    else:
        raise InvalidRequest("a chunk's length is not a number")
    if not 0 < length <= MAX_BYTES or len(message) != start + length + _END_BYTES:
        raise InvalidRequest(f"a chunk of {len(message)} bytes says that it holds {length}; at most {MAX_BYTES}")
    data, end = memoryview(message)[start : start + length], message[start + length :]
    if end[:1] != _CHECKSUM_TAG:
        raise InvalidRequest(f"a chunk of {len(message)} bytes does not end with its checksum")
    if end[1:] != _checksum(data, offset_bytes):
        raise Unavailable(f"{length} bytes at offset {offset_bytes} came with a wrong checksum", retry_after_s=0.0)
    return data


def _checksum(data: memoryview, offset_bytes: int) -> bytes:
    return xxhash.xxh3_64_intdigest(data, seed=offset_bytes).to_bytes(8, "little")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
