"""The digest that guards the bytes of weights on their way."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

DIGEST_BYTES = 16

STEP_BYTES = 256 * 2**10
"""What is copied goes into its digest in steps of this size, which are still in the core's own cache then."""

Running = xxhash.xxh3_128
"""A digest that grows: `update`, in order, then `digest`."""


def digest(data: memoryview) -> bytes:
    """XXH3-128, big-endian. Runs without the interpreter lock.

    It finds what went wrong by accident; it is no proof against bytes that somebody chose.
    """
    return xxhash.xxh3_128_digest(data)


def steps(size_bytes: int) -> Iterator[tuple[int, int]]:
    """Where each step begins and ends."""
    for begin in range(0, size_bytes, STEP_BYTES):
        yield begin, min(begin + STEP_BYTES, size_bytes)
