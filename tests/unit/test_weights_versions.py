"""What is served changes by a complete, right and newer update, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest, ModelMismatch, RpcError, Unavailable
from kdmesh.types import DType
from kdmesh.weights.buckets import BucketEntry, Part
from kdmesh.weights.digests import digest
from kdmesh.weights.manifest import AdapterSpec, LowRankSpec, Manifest, TensorSpec
from kdmesh.weights.versions import UpdateState, WeightVersions
from tests.support.weight_targets import FINGERPRINT, MemoryTarget, is_same, manifest_of, random_weights

WEIGHTS = random_weights({"embedding": (5, 3), "norm": (7,), "scale": ()}, seed=0)
SPECS = list(WEIGHTS)


@pytest.fixture
def target() -> MemoryTarget:
    return MemoryTarget(SPECS)


@pytest.fixture
def versions(target: MemoryTarget) -> WeightVersions:
    return WeightVersions(target, architecture_fingerprint=FINGERPRINT)


def _entry(index: int, *, begin: int = 0, end: int | None = None) -> tuple[BucketEntry, memoryview]:
    """Some bytes of a tensor as a bucket of their own."""
    tensor = WEIGHTS[SPECS[index]].reshape(-1).view(torch.uint8)[begin:end]
    data = memoryview(tensor.numpy().tobytes())
    part = Part(tensor=index, tensor_offset_bytes=begin, bucket_offset_bytes=0, size_bytes=len(data))
    return BucketEntry(part=part, digest=digest(data)), data


def _write(versions: WeightVersions, index: int, **bounds: int) -> None:
    entry, data = _entry(index, **bounds)
    versions.write([entry], data)


def _begin(versions: WeightVersions, version: int = 1) -> None:
    versions.admit(manifest_of(SPECS, version=version))
    versions.begin()


def _update(versions: WeightVersions, version: int) -> None:
    _begin(versions, version)
    for index in range(len(SPECS)):
        _write(versions, index)
    versions.verify()
    versions.commit()


def test_an_update_goes_through_its_states(versions: WeightVersions, target: MemoryTarget) -> None:
    states = [versions.state]
    _begin(versions)
    states.append(versions.state)
    for index in range(len(SPECS)):
        _write(versions, index)
    versions.verify()
    states.append(versions.state)
    assert (versions.version, target.version) == (0, 0)
    versions.commit()
    states.append(versions.state)
    assert states == [UpdateState.SERVING, UpdateState.RECEIVING, UpdateState.VERIFIED, UpdateState.SERVING]
    assert (versions.version, target.version) == (1, 1)
    assert all(is_same(target.served[spec.name], tensor) for spec, tensor in WEIGHTS.items())


def test_tensors_may_be_announced_in_any_order(versions: WeightVersions, target: MemoryTarget) -> None:
    versions.admit(manifest_of(SPECS[::-1]))
    versions.begin()
    for announced, index in enumerate([2, 1, 0]):
        entry, data = _entry(index)
        versions.write([replace(entry, part=replace(entry.part, tensor=announced))], data)
    versions.verify()
    versions.commit()
    assert all(is_same(target.served[spec.name], tensor) for spec, tensor in WEIGHTS.items())


def _other(**changes: object) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_other(architecture_fingerprint="0" * 32), ModelMismatch, "fingerprint 0000"),
        (_other(version=2), ModelMismatch, "version 2 is not newer than the one served, 2: another job"),
        (_other(version=1), ModelMismatch, "version 1 is not newer"),
        (_other(tensors=tuple(SPECS[1:])), InvalidRequest, "lacks embedding"),
        (
            _other(tensors=(*SPECS, TensorSpec(name="bias", shape=(1,), dtype=DType.BFLOAT16))),
            InvalidRequest,
            "no tensor bias",
        ),
        (_other(tensors=(replace(SPECS[0], shape=(3, 5)), *SPECS[1:])), InvalidRequest, r"bfloat16 of \(3, 5\)"),
        (_other(tensors=(replace(SPECS[0], dtype=DType.FLOAT32), *SPECS[1:])), InvalidRequest, "float32 of"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_before_anything_is_made(
    versions: WeightVersions,
    target: MemoryTarget,
    change: Callable[[Manifest], Manifest],
    error: type[RpcError],
    message: str,
) -> None:
    _update(versions, 2)
    with pytest.raises(error, match=message):
        versions.admit(change(manifest_of(SPECS, version=3)))
    assert target.staged is None and versions.state is UpdateState.SERVING
    _update(versions, 3)


@pytest.mark.parametrize("tensors", [(), (SPECS[0], SPECS[0])])
def test_a_manifest_names_tensors_once(tensors: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"without a tensor|names embedding twice"):
        manifest_of(tensors)


BASE = bytes(range(16))
CHANGE = LowRankSpec(tensor="embedding", rank=2, scaling=0.25)
FACTORS = CHANGE.factors((5, 3))
VALUES = {spec: torch.arange(spec.size_bytes // 4, dtype=torch.float32).reshape(spec.shape) for spec in FACTORS}


def _announce(
    versions: WeightVersions, specs: Sequence[TensorSpec], *, version: int, base: bytes = BASE, **changes: object
) -> None:
    adapter = AdapterSpec(base=base, changes=(replace(CHANGE, **changes),))  # type: ignore[arg-type]
    versions.admit(replace(manifest_of(specs, version=version), adapter=adapter))


def _adapt(versions: WeightVersions, specs: Sequence[TensorSpec], *, version: int, times: float = 1) -> None:
    """An update with an adapter, up to its commit; its factors are `times` VALUES."""
    _announce(versions, specs, version=version)
    versions.begin()
    for index, spec in enumerate(specs):
        tensor = times * VALUES[spec] if spec in FACTORS else WEIGHTS[spec]
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        part = Part(tensor=index, tensor_offset_bytes=0, bucket_offset_bytes=0, size_bytes=len(data))
        versions.write([BucketEntry(part=part, digest=digest(data))], data)
    versions.verify()


def _sums(times: float = 1) -> dict[str, Tensor]:
    a, b = VALUES.values()
    embedding = WEIGHTS[SPECS[0]]
    changed = (embedding.double() + 0.25 * times**2 * (b.double() @ a.double())).bfloat16()
    return {**{spec.name: tensor for spec, tensor in WEIGHTS.items()}, "embedding": changed}


def _is_served(target: MemoryTarget, expected: dict[str, Tensor]) -> bool:
    return all(is_same(target.served[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in expected.items())


def test_changes_are_added_to_the_base_that_came_with_the_first_of_them(
    versions: WeightVersions, target: MemoryTarget
) -> None:
    _adapt(versions, [*SPECS, *FACTORS], version=1)
    assert target.served == {}
    versions.commit()
    assert _is_served(target, _sums())
    _adapt(versions, FACTORS, version=2, times=3)
    assert _is_served(target, _sums())
    versions.discard()
    assert _is_served(target, _sums()) and target.staged is None
    _adapt(versions, FACTORS[::-1], version=2, times=2)
    versions.commit()
    assert _is_served(target, _sums(times=2)) and versions.version == 2


def test_changes_to_a_base_that_is_not_held_are_refused(versions: WeightVersions, target: MemoryTarget) -> None:
    with pytest.raises(ModelMismatch, match=r"base 000102.* and the base held is none"):
        _announce(versions, FACTORS, version=1)
    _adapt(versions, [*SPECS, *FACTORS], version=1)
    versions.discard()  # it did not come to be served
    with pytest.raises(ModelMismatch, match="the base held is none"):
        _announce(versions, FACTORS, version=1)
    _adapt(versions, [*SPECS, *FACTORS], version=1)
    versions.commit()
    with pytest.raises(ModelMismatch, match=r"base ffff.* and the base held is 0001"):
        _announce(versions, FACTORS, version=2, base=b"\xff" * 16)
    _update(versions, 2)
    with pytest.raises(ModelMismatch, match="the base held is none"):
        _announce(versions, FACTORS, version=3)
    assert target.staged is None and versions.state is UpdateState.SERVING


@pytest.mark.parametrize(
    ("specs", "changes", "message"),
    [
        (FACTORS[:1], {}, r"lacks embedding\.b"),
        ([*FACTORS, SPECS[0]], {}, "lacks norm, scale"),
        ((FACTORS[0], replace(FACTORS[1], dtype=DType.BFLOAT16)), {}, r"lacks embedding\.b .* float32 factors"),
        (FACTORS, {"rank": 3}, r"lacks embedding\.a, embedding\.b"),
        (FACTORS, {"tensor": "norm"}, "norm is to be changed, and is no matrix"),
        (FACTORS, {"tensor": "bias"}, "bias is to be changed, and is no matrix"),
        (FACTORS, {"rank": 0}, "rank must be above 0"),
        (FACTORS, {"scaling": float("nan")}, "scaling finite"),
        (FACTORS, {"base": b"x"}, "a name of 1 bytes"),
    ],
)
def test_changes_that_do_not_fit_are_refused_before_anything_is_made(
    versions: WeightVersions,
    target: MemoryTarget,
    specs: Sequence[TensorSpec],
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _announce(versions, specs, version=1, **changes)  # type: ignore[arg-type]
    assert target.staged is None and versions.state is UpdateState.SERVING


def test_one_update_at_a_time(versions: WeightVersions) -> None:
    _begin(versions)
    with pytest.raises(Unavailable, match="update to version 1 is under way"):
        versions.admit(manifest_of(SPECS, version=2))
    versions.discard()
    _update(versions, 2)


def _changed(**changes: int | bytes) -> Callable[[BucketEntry], BucketEntry]:
    def change(entry: BucketEntry) -> BucketEntry:
        if "digest" in changes:
            return replace(entry, digest=changes["digest"])  # type: ignore[arg-type]
        return replace(entry, part=replace(entry.part, **changes))  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(digest=bytes(16)), "not those sent"),
        (_changed(tensor=3), "a part of tensor 3; 3 tensors"),
        (_changed(tensor_offset_bytes=2), "parts come in order"),
        (_changed(tensor=2), "parts come in order"),  # longer than that tensor
        (_changed(bucket_offset_bytes=32), "multiples of 64"),
        (_changed(bucket_offset_bytes=64), "lie inside"),
        (_changed(size_bytes=31), "lie inside"),
        (_changed(size_bytes=0), "lie inside"),
    ],
)
def test_a_part_that_is_wrong_is_refused(
    versions: WeightVersions, change: Callable[[BucketEntry], BucketEntry], message: str
) -> None:
    _begin(versions)
    entry, data = _entry(0)
    with pytest.raises(InvalidRequest, match=message):
        versions.write([change(entry)], data)


def test_no_byte_comes_twice(versions: WeightVersions) -> None:
    _begin(versions)
    _write(versions, 0, end=16)
    with pytest.raises(InvalidRequest, match="16 of its 30 bytes have come"):
        _write(versions, 0, end=16)
    _write(versions, 0, begin=16)
    with pytest.raises(InvalidRequest, match="30 of its 30 bytes have come"):
        _write(versions, 0)


def test_a_part_ends_with_an_element(versions: WeightVersions) -> None:
    _begin(versions)
    with pytest.raises(InvalidRequest, match="end within an element; it is bfloat16"):
        _write(versions, 0, end=15)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_leave_those_that_are_served(dtype: DType, bad: float) -> None:
    weights = random_weights({"wide": (9, 2**15)}, seed=1, dtype=dtype)
    [(spec, good)] = weights.items()
    target = MemoryTarget([spec])
    versions = WeightVersions(target, architecture_fingerprint=FINGERPRINT)
    for version, value, place in ((1, 0.0, 0), (2, bad, 0), (3, bad, -1), (4, torch.finfo(good.dtype).max, -1)):
        tensor = good.clone()
        tensor.view(-1)[place] = value
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        part = Part(tensor=0, tensor_offset_bytes=0, bucket_offset_bytes=0, size_bytes=len(data))
        versions.admit(manifest_of([spec], version=version))
        versions.begin()
        if version in (2, 3):
            with pytest.raises(InvalidRequest, match="wide is not finite"):
                versions.write([BucketEntry(part=part, digest=digest(data))], data)
            versions.discard()
            assert (versions.version, target.version) == (1, 1)
            continue
        versions.write([BucketEntry(part=part, digest=digest(data))], data)
        versions.verify()
        versions.commit()
    assert is_same(target.served["wide"], tensor)


def test_a_sum_that_is_not_finite_is_not_served(versions: WeightVersions, target: MemoryTarget) -> None:
    _adapt(versions, [*SPECS, *FACTORS], version=1)
    versions.commit()
    with pytest.raises(InvalidRequest, match="embedding is not finite with what is added"):
        _adapt(versions, FACTORS, version=2, times=1e20)
    versions.discard()
    assert _is_served(target, _sums()) and (versions.version, target.staged) == (1, None)


def test_what_is_not_complete_is_not_committed(versions: WeightVersions, target: MemoryTarget) -> None:
    _begin(versions)
    _write(versions, 0)
    _write(versions, 1, end=2)
    with pytest.raises(InvalidRequest, match=r"norm, scale \(2 in all\)"):
        versions.verify()
    versions.discard()
    assert target.staged is None and versions.version == 0


def test_a_discarded_update_leaves_no_trace(versions: WeightVersions, target: MemoryTarget) -> None:
    _update(versions, 4)
    served: dict[str, Tensor] = target.served
    _begin(versions, 5)
    _write(versions, 0)
    versions.discard()
    assert target.served is served and (versions.version, versions.state) == (4, UpdateState.SERVING)
    versions.discard()
    _update(versions, 5)
