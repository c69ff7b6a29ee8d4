"""A sharded student gets to real servers, bit for bit, from any number of ranks."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from kdmesh.errors import ConfigError, DeadlineExpired, KdmeshError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.checkpoint import open_checkpoint
from kdmesh.models.fingerprint import architecture_fingerprint, named_weights
from kdmesh.models.replaceable import ReplaceableWeights
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.rpc.weights.services import ServedWeights
from kdmesh.sglang.runtime import SglangRuntime
from kdmesh.sglang.weights import SglangWeights
from kdmesh.types import DType
from kdmesh.weights.digests import digest
from kdmesh.weights.manifest import TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Changes, Weights
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.publisher import StudentPublisher
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.student.model import Student
from tests.support.tiny_models import FAMILIES, VOCABULARY_SIZE, TinyModels
from tests.support.trainer_parts import build_student
from tests.support.trainer_ranks import run_ranks
from tests.support.weight_server import served_by, weight_server_process

BUCKET_BYTES = 2**14  # the embedding takes several


def publish(mesh: Mesh, path: str, address: str, steps: list[int]) -> list[int]:
    """Publishes a student that changes by 1 with each step; the weight versions it had."""
    student = build_student(Path(path), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    sender = WeightSender([address], bucket_bytes=BUCKET_BYTES, deadline_s=30) if mesh.is_first else None
    publisher = StudentPublisher(student, sender, policy=UpdatePolicy.FINISH, mesh=mesh)
    whole = _watch(publisher)
    versions, done = [], 0
    for step in steps:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(step - done)
        done = step
        publisher.publish(version=step)
        versions.append(publisher.weight_version(step))
    assert max(whole) == 0, "a whole tensor lived while the next was gathered"
    if sender is not None:
        sender.close()
    return versions


def _watch(publisher: StudentPublisher) -> list[int]:
    """How many tensors that were gathered before live when the next one is."""
    alive: list[int] = []
    gathered: weakref.WeakSet[Tensor] = weakref.WeakSet()
    gather = publisher._gather

    def watched(index: int) -> Tensor:
        alive.append(len(gathered))
        tensor = gather(index)
        gathered.add(tensor)
        return tensor

    publisher._gather = watched  # type: ignore[method-assign]
    return alive


def _specs(path: Path, dtype: DType) -> list[TensorSpec]:
    weights = named_weights(load_causal_lm(path, "auto", torch.device("cpu")))
    return [TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype) for name, tensor in weights.items()]


def _expected(path: Path, dtype: DType, steps: list[int]) -> str:
    weights = named_weights(load_causal_lm(path, torch.float32, torch.device("cpu")))
    with torch.no_grad():
        for parameter in weights.values():
            for before, after in itertools.pairwise([0, *steps]):
                parameter.add_(after - before)
    whole = [weights[name].detach().to(getattr(torch, dtype.value)) for name in sorted(weights)]
    return digest(torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in whole]).numpy().data).hex()


@pytest.mark.parametrize(
    ("ranks", "dtype", "tied"),
    [
        (1, DType.BFLOAT16, True),
        (2, DType.BFLOAT16, False),
        pytest.param(2, DType.FLOAT32, True, marks=pytest.mark.slow),
    ],
)
def test_servers_get_the_student_bit_for_bit(
    ranks: int, dtype: DType, tied: bool, tiny_models: TinyModels, tmp_path: Path
) -> None:
    path, steps = tiny_models.path(tie_word_embeddings=tied), [0, 1, 2]
    fingerprint = architecture_fingerprint(load_causal_lm(path, "auto", torch.device("cpu")))
    running = weight_server_process(tmp_path / "ready", _specs(path, dtype), fingerprint=fingerprint)
    with running as (_, address):
        results = run_ranks(
            "tests.contract.test_trainer_publisher:publish", ranks=ranks, path=str(path), address=address, steps=steps
        )
        assert results == [[1, 2, 3]] * ranks
        assert served_by(address) == (3, _expected(path, dtype, steps))


def test_numbers_rise_when_a_run_goes_back_to_an_earlier_step(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models.path()
    fingerprint = architecture_fingerprint(load_causal_lm(path, "auto", torch.device("cpu")))
    running = weight_server_process(tmp_path / "ready", _specs(path, DType.BFLOAT16), fingerprint=fingerprint)
    with running as (_, address), joined("cpu", longest_wait_s=60) as mesh:
        for steps, versions in (([0, 1, 2], [1, 2, 3]), ([1, 1], [4, 5])):
            assert publish(mesh, str(path), address, steps) == versions
            assert served_by(address) == (versions[-1], _expected(path, DType.BFLOAT16, steps))


def publish_adapted(mesh: Mesh, path: str, address: str, output: str, options: dict[str, Any]) -> list[list[str]]:
    """Publishes a student three times, its adapters changed each time, and writes it as a whole model at the end.

    Returns the names of what was gathered each time.
    """
    lora = LoraConfig(rank=3, alpha=12, target_modules=("k_proj", "down_proj"), **options)
    student = build_student(Path(path), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32, lora=lora)
    sender = WeightSender([address], bucket_bytes=BUCKET_BYTES, deadline_s=30) if mesh.is_first else None
    publisher = StudentPublisher(student, sender, policy=UpdatePolicy.FINISH, mesh=mesh)
    gathered: list[list[str]] = []
    gather = publisher._gather

    def noted(index: int) -> Tensor:
        gathered[-1].append(publisher._sent[index].spec.name)
        return gather(index)

    publisher._gather = noted  # type: ignore[method-assign]
    for step in range(3):
        gathered.append([])
        publisher.publish(version=step)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad and step < 2:
                    # Few binary places: whoever adds it up, in whatever order, rounds once.
                    parameter.add_(1 / 16).mul_(64).round_().div_(64)
    if sender is not None:
        sender.close()
    tokenizer = load_fast_tokenizer(Path(path))
    HuggingFaceExporter(Path(output), student, origin=Path(path), tokenizer=tokenizer, mesh=mesh).export()
    return gathered


# What a server in bfloat16 cannot hold exactly comes to it whole, each time; so does what is more than a sum.
@pytest.mark.parametrize(
    ("dtype", "options", "is_apart"),
    [
        pytest.param(torch.bfloat16, {}, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, {}, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, {"use_dora": True}, False, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"base": "nf4"}, True, marks=pytest.mark.slow),
    ],
)
def test_servers_serve_matrices_with_their_adapters_and_get_the_base_once(
    dtype: torch.dtype, options: dict[str, Any], is_apart: bool, tiny_models: TinyModels, tmp_path: Path
) -> None:
    path = tiny_models.path("qwen3", dtype=dtype, hidden_size=64, head_dim=16)
    specs = _specs(path, DType.BFLOAT16)
    fingerprint = architecture_fingerprint(load_causal_lm(path, "auto", torch.device("cpu")))
    with weight_server_process(tmp_path / "ready", specs, fingerprint=fingerprint) as (_, address):
        arguments = {"path": str(path), "address": address, "output": str(tmp_path / "whole"), "options": options}
        results = run_ranks("tests.contract.test_trainer_publisher:publish_adapted", ranks=2, **arguments)
        assert served_by(address) == (3, _expected(tmp_path / "whole", DType.BFLOAT16, []))
        assert served_by(address) != (3, _expected(path, DType.BFLOAT16, []))
    base = [spec.name for spec in specs]
    factors = [f"{name}.{side}" for name in base if "k_proj" in name or "down_proj" in name for side in "ab"]
    assert results == [[base + factors, factors, factors] if is_apart else [base] * 3] * 2


class _FailingSender:
    """Has two tensors made twice, and fails."""

    def describe(self) -> tuple[ServedWeights, ...]:
        return (ServedWeights(address="a", version=7, dtype=DType.BFLOAT16),)

    def outdated(self, version: int, *, among: Collection[str] = ()) -> frozenset[str]:
        return frozenset()

    def publish(
        self,
        version: int,
        architecture_fingerprint: str,
        tensors: Weights,
        policy: UpdatePolicy,
        changes: Changes | None = None,
        *,
        to: Collection[str] | None = None,
        needed: int | None = None,
    ) -> frozenset[str]:
        for _ in range(2):
            for spec, make in tensors[:2]:
                assert make().shape == spec.shape
        raise DeadlineExpired(f"version {version} was not taken")


class _NotingSender(_FailingSender):
    """Takes everything, and knows under which numbers."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def publish(self, version: int, *arguments: object, **options: object) -> frozenset[str]:
        self.versions.append(version)
        return frozenset()


@pytest.mark.parametrize("come_and_go", [False, True])
def test_numbers_are_above_those_of_servers_that_may_come_later(come_and_go: bool, tiny_models: TinyModels) -> None:
    """Where none comes, they go on from the highest there is."""
    sender, before_ms = _NotingSender(), time.time_ns() // 10**6
    with joined("cpu", longest_wait_s=60) as mesh:
        student = build_student(tiny_models.path(), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
        publisher = StudentPublisher(student, sender, policy=UpdatePolicy.FINISH, mesh=mesh, come_and_go=come_and_go)
        for step in range(2):
            publisher.publish(version=step)
    first, second = sender.versions
    assert second == first + 1
    assert first > before_ms if come_and_go else first == 8


class _TakingSender(_FailingSender):
    """Has every tensor made, and keeps its spec."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []

    def publish(
        self, version: int, architecture_fingerprint: str, tensors: Weights, *rest: object, **options: object
    ) -> frozenset[str]:
        for spec, make in tensors:
            assert make().dtype == getattr(torch, spec.dtype.value)
            self.specs.append(spec)
        return frozenset[str]()


@pytest.fixture
def mixture(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture whose routers transformers keeps in float32, in bfloat16."""
    monkeypatch.setitem(FAMILIES, "glm4_moe", {"n_routed_experts": 4, "num_experts_per_tok": 2})
    return tiny_models.path("glm4_moe", dtype=torch.bfloat16, moe_intermediate_size=16)


def test_servers_get_each_tensor_in_the_type_that_they_hold_it_in(mixture: Path) -> None:
    served = ReplaceableWeights(load_causal_lm(mixture, torch.bfloat16, torch.device("cpu"))).tensor_specs()
    sender = _TakingSender()
    with joined("cpu", longest_wait_s=60) as mesh:
        student = build_student(mixture, mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
        StudentPublisher(student, sender, policy=UpdatePolicy.FINISH, mesh=mesh).publish(version=0)
    assert {spec.dtype for spec in served} == {DType.BFLOAT16, DType.FLOAT32}
    assert sorted(sender.specs, key=str) == sorted(served, key=str)


def test_servers_of_sglang_expect_the_same_types(mixture: Path) -> None:
    runtime = SimpleNamespace(checkpoint=open_checkpoint(mixture), dtype=DType.BFLOAT16)
    held = ReplaceableWeights(load_causal_lm(mixture, torch.bfloat16, torch.device("cpu"))).tensor_specs()
    assert SglangWeights(cast(SglangRuntime, runtime)).tensor_specs() == held


class _SilentSender(_FailingSender):
    """Hears from no server."""

    def describe(self) -> tuple[ServedWeights, ...]:
        raise DeadlineExpired("nobody has answered")


class _MixedSender(_FailingSender):
    """Knows servers that differ."""

    def describe(self) -> tuple[ServedWeights, ...]:
        (one,) = super().describe()
        return one, replace(one, address="b", dtype=DType.FLOAT32)


def fail(mesh: Mesh, path: str) -> list[str]:
    """What a rank hears."""
    student = build_student(Path(path), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    heard = []
    for make in (_FailingSender, _SilentSender, _MixedSender):
        sender = make() if mesh.is_first else None
        publisher = StudentPublisher(student, sender, policy=UpdatePolicy.FINISH, mesh=mesh)
        try:
            publisher.publish(version=0)
        except KdmeshError as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard


def test_every_rank_hears_that_the_weights_were_not_taken(tiny_models: TinyModels) -> None:
    results = run_ranks("tests.contract.test_trainer_publisher:fail", ranks=2, path=str(tiny_models.path()))
    assert (
        results
        == [
            [
                "StepLost: version 8 was not taken",
                "StepLost: nobody has answered",
                "StepLost: the servers' weights have several element types: bfloat16 at a, float32 at b",
            ]
        ]
        * 2
    )


def test_a_student_with_numbers_that_cannot_be_sent_is_refused(tiny_models: TinyModels) -> None:
    student = Student(load_causal_lm(tiny_models.path(), "auto", torch.device("cpu")), vocabulary_size=VOCABULARY_SIZE)
    student.lm.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
    with joined("cpu", longest_wait_s=60) as mesh, pytest.raises(ConfigError, match=r"steps is torch\.int64"):
        StudentPublisher(student, _FailingSender(), policy=UpdatePolicy.FINISH, mesh=mesh)
