"""Which bytes of which tensor lie where in which bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

ALIGNMENT_BYTES = 64
"""Of everything in a bucket; as every element's size divides it, no element is ever cut in two."""

MAX_BUCKET_BYTES = 64 * 2**20
"""A bucket costs its announcement and its answer, whatever its size; past this there is little of that left."""
_MIN_BUCKET_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One whole tensor, or a part of one that spans buckets."""

    tensor: int  # index in the manifest
    tensor_offset_bytes: int
    bucket_offset_bytes: int  # a multiple of ALIGNMENT_BYTES
    size_bytes: int  # at least 1

    @property
    def end_bytes(self) -> int:
        """Where in the bucket it ends."""
        return self.bucket_offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketEntry:
    """A part, and what its bytes must be."""

    part: Part
    digest: bytes  # XXH3-128


def bucket_size(model_bytes: int) -> int:
    """How large a model's buckets should be: a third of it, for the three that are held, up to MAX_BUCKET_BYTES."""
    third = _aligned(-(-model_bytes // 3))
    return min(max(third, _MIN_BUCKET_BYTES), MAX_BUCKET_BYTES)


def plan_buckets(sizes_bytes: Sequence[int], bucket_bytes: int) -> Iterator[tuple[Part, ...]]:
    """Fill one bucket after the other with tensors in their order; one that does not fit goes on in the next.

    So the parts of a tensor come in order, and no bucket but the last is left with room. A tensor without
    elements has no part.

    Args:
        sizes_bytes: of each tensor.
        bucket_bytes: most bytes of a bucket, padding included; a multiple of ALIGNMENT_BYTES.
    """
    assert bucket_bytes > 0 and bucket_bytes % ALIGNMENT_BYTES == 0
    bucket: list[Part] = []
    end = 0
    for tensor, size_bytes in enumerate(sizes_bytes):
        done = 0
        while done < size_bytes:
            if end == bucket_bytes:
                yield tuple(bucket)
                bucket, end = [], 0
            fits = min(size_bytes - done, bucket_bytes - end)
            part = Part(tensor=tensor, tensor_offset_bytes=done, bucket_offset_bytes=end, size_bytes=fits)
            bucket.append(part)
            done += fits
            end = _aligned(part.end_bytes)
    if bucket:
        yield tuple(bucket)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a part, in a smaller bucket."""

    part: Part
    origin_bytes: int  # where its bytes begin in the bucket that was cut


def cut(parts: Sequence[Part], most_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """The same bytes in their order, as smaller buckets of at most `most_bytes`, a multiple of ALIGNMENT_BYTES."""
    for bucket in plan_buckets([part.size_bytes for part in parts], most_bytes):
        yield tuple(_piece(parts[smaller.tensor], smaller) for smaller in bucket)


def _piece(whole: Part, smaller: Part) -> Piece:
    """`smaller` was planned as if `whole` were a tensor."""
    offset = smaller.tensor_offset_bytes
    part = replace(smaller, tensor=whole.tensor, tensor_offset_bytes=whole.tensor_offset_bytes + offset)
    return Piece(part=part, origin_bytes=whole.bucket_offset_bytes + offset)


def _aligned(offset_bytes: int) -> int:
    return -(-offset_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
