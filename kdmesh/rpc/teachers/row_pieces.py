"""How the bytes of a matrix are cut to go through a group: the same on both sides."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

PIECE_BYTES = 8 * 2**20
"""Each piece has a deadline of its own."""

Checksum = xxhash.xxh3_64
"""Of all pieces: `update` in order, then `intdigest`."""


def pieces(data: memoryview) -> Iterator[memoryview]:
    """The pieces of a matrix's bytes, in order."""
    for begin in range(0, len(data), PIECE_BYTES):
        yield data[begin : begin + PIECE_BYTES]
