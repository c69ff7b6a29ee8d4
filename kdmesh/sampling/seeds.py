"""Seeds that have nothing in common."""

from __future__ import annotations

import hashlib

_SEED_BYTES = 6  # so that as many samples as anybody draws may count up from it


def seed_of(purpose: str, *numbers: int) -> int:
    """A seed below 2^48, another for every purpose and for all numbers, each of which is from 0 to 2^64 - 1."""
    words = purpose.encode() + b"".join(number.to_bytes(8, "little") for number in numbers)
    return int.from_bytes(hashlib.blake2b(words, digest_size=_SEED_BYTES).digest(), "little")
