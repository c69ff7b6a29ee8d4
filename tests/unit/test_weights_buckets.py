"""Any tensors survive packing; no wrong bit does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdmesh.errors import InvalidRequest
from kdmesh.types import DType
from kdmesh.weights.buckets import ALIGNMENT_BYTES, BucketEntry, Part, bucket_size, cut, plan_buckets
from kdmesh.weights.digests import digest
from kdmesh.weights.manifest import TensorSpec
from kdmesh.weights.versions import WeightVersions
from tests.support.weight_targets import FINGERPRINT, MemoryTarget, is_same, manifest_of, random_weights

_SHAPES = st.lists(
    st.lists(st.integers(0, 40), max_size=3).map(tuple).filter(lambda shape: np.prod(shape) <= 2000),
    min_size=1,
    max_size=8,
)
_BUCKET_BYTES = st.integers(1, 40).map(lambda cells: cells * ALIGNMENT_BYTES)


def _packed(tensors: list[bytes], parts: tuple[Part, ...]) -> tuple[list[BucketEntry], bytearray]:
    """A bucket as a sender fills it; what lies between the parts is noise."""
    bucket = bytearray(b"\xaa" * max(part.end_bytes for part in parts))
    entries = []
    for part in parts:
        octets = tensors[part.tensor][part.tensor_offset_bytes :][: part.size_bytes]
        bucket[part.bucket_offset_bytes : part.end_bytes] = octets
        entries.append(BucketEntry(part=part, digest=digest(memoryview(octets))))
    return entries, bucket


def _receiver(specs: list[TensorSpec]) -> tuple[WeightVersions, MemoryTarget]:
    target = MemoryTarget(specs)
    versions = WeightVersions(target, architecture_fingerprint=FINGERPRINT)
    versions.admit(manifest_of(specs))
    versions.begin()
    return versions, target


def _octets(weights: dict[TensorSpec, Tensor]) -> list[bytes]:
    return [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in weights.values()]


def _named(shapes: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {str(number): shape for number, shape in enumerate(shapes)}


@given(shapes=_SHAPES, bucket_bytes=_BUCKET_BYTES, dtype=st.sampled_from(DType), seed=st.integers(0, 2**32))
def test_any_tensors_survive_packing(shapes: list[tuple[int, ...]], bucket_bytes: int, dtype: DType, seed: int) -> None:
    weights = random_weights(_named(shapes), seed=seed, dtype=dtype)
    octets = _octets(weights)
    versions, target = _receiver(list(weights))
    for parts in plan_buckets([spec.size_bytes for spec in weights], bucket_bytes):
        assert parts[-1].end_bytes <= bucket_bytes
        entries, bucket = _packed(octets, parts)
        versions.write(entries, memoryview(bucket))
    versions.verify()
    versions.commit()
    assert all(is_same(target.served[spec.name], tensor) for spec, tensor in weights.items())


@given(shapes=_SHAPES, bucket_bytes=_BUCKET_BYTES)
def test_buckets_are_full(shapes: list[tuple[int, ...]], bucket_bytes: int) -> None:
    buckets = list(plan_buckets([2 * int(np.prod(shape)) for shape in shapes], bucket_bytes))
    assert all(bucket_bytes - parts[-1].end_bytes < ALIGNMENT_BYTES for parts in buckets[:-1])


@given(shapes=_SHAPES, bucket_bytes=_BUCKET_BYTES, most_bytes=_BUCKET_BYTES)
def test_a_bucket_that_is_cut_holds_the_same_bytes(
    shapes: list[tuple[int, ...]], bucket_bytes: int, most_bytes: int
) -> None:
    for parts in plan_buckets([2 * int(np.prod(shape)) for shape in shapes], bucket_bytes):
        buckets = list(cut(parts, most_bytes))
        assert all(bucket[-1].part.end_bytes <= most_bytes for bucket in buckets)
        pieces = [piece for bucket in buckets for piece in bucket]
        before = [octet for part in parts for octet in _places(part, part.bucket_offset_bytes)]
        assert before == [octet for piece in pieces for octet in _places(piece.part, piece.origin_bytes)]


def _places(part: Part, begin: int) -> list[tuple[int, int, int]]:
    """Of each byte: the tensor, where in the tensor, where in the bucket that was cut."""
    return [(part.tensor, part.tensor_offset_bytes + i, begin + i) for i in range(part.size_bytes)]


@given(data=st.data(), shapes=_SHAPES.filter(lambda shapes: any(map(np.prod, shapes))), bucket_bytes=_BUCKET_BYTES)
def test_any_flipped_bit_is_noticed(data: st.DataObject, shapes: list[tuple[int, ...]], bucket_bytes: int) -> None:
    weights = random_weights(_named(shapes), seed=len(shapes))
    parts = data.draw(st.sampled_from(list(plan_buckets([spec.size_bytes for spec in weights], bucket_bytes))))
    entries, bucket = _packed(_octets(weights), parts)
    part = data.draw(st.sampled_from(parts))
    place = data.draw(st.integers(part.bucket_offset_bytes, part.end_bytes - 1))
    bucket[place] ^= 1 << data.draw(st.integers(0, 7))
    versions, _ = _receiver(list(weights))
    for earlier in plan_buckets([spec.size_bytes for spec in weights], bucket_bytes):
        if earlier == parts:
            break
        right, octets = _packed(_octets(weights), earlier)
        versions.write(right, memoryview(octets))
    with pytest.raises(InvalidRequest, match="not those sent"):
        versions.write(entries, memoryview(bucket))


@pytest.mark.parametrize(
    ("model_bytes", "wanted_bytes"), [(0, 2**20), (6 * 2**20 + 3, 2 * 2**20 + 64), (2**40, 64 * 2**20)]
)
def test_buckets_suit_the_model(model_bytes: int, wanted_bytes: int) -> None:
    assert bucket_size(model_bytes) == wanted_bytes
