"""The digest that guards the bytes of weights on their way."""

from __future__ import annotations

import xxhash

DIGEST_BYTES = 16


def digest(data: memoryview) -> bytes:
    """XXH3-128, big-endian. Runs without the interpreter lock.

    It finds what went wrong by accident; it is no proof against bytes that somebody chose.
    """
    return xxhash.xxh3_128_digest(data)
