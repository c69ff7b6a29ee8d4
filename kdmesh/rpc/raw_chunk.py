"""Encodes and decodes ReadHandleChunk without a protobuf library: one copy on each side."""

from __future__ import annotations

from kdmesh.errors import InvalidRequest

MAX_BYTES = 2 * 2**20
"""Most data of one chunk."""

GOOD_BYTES = 512 * 2**10
"""Data of a chunk that is worth its overhead; from 1 MiB on, each message costs the server twice as much per byte."""

_TAG = b"\x0a"  # field 1, length-delimited


def encode(data: memoryview) -> bytes:
    """The message that holds `data`: 1 to MAX_BYTES bytes."""
    return b"".join((_TAG, _varint(len(data)), data))


def decode(message: bytes) -> memoryview:
    """The data of a message, as a view into it.

    Raises:
        InvalidRequest: when it is not exactly one data field of 1 to MAX_BYTES bytes.
    """
    if message[:1] != _TAG:
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
    if not 0 < length <= MAX_BYTES or len(message) != start + length:
        raise InvalidRequest(f"a chunk of {len(message)} bytes says that it holds {length}; at most {MAX_BYTES}")
    return memoryview(message)[start:]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
