"""What a teacher that follows the student is to have, sharded and after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdmesh.weights.digests import digest
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.saving.checkpoint import CheckpointDirectory
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.model import Student
from kdmesh_trainer.student.weights import StudentWeight, without_aliases
from kdmesh_trainer.teacher_copy import TeacherCopy
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels
from tests.support.trainer_parts import build_student
from tests.support.trainer_ranks import run_ranks

KINDS: list[dict[str, Any]] = [
    {"every": 1, "decay": 0.9},
    {"every": 3, "decay": None},
    {"every": 3, "decay": 0.9},
]
STEPS, SAVE_AT = 7, 4


def follow_each(mesh: Mesh, *, path: str, checkpoints: str) -> list[dict[str, Any]]:
    """What becomes of the copy, for every kind."""
    return [
        follow(mesh, path=path, checkpoints=f"{checkpoints}/{number}", lora=None, **kind)
        for number, kind in enumerate(KINDS)
    ]


def follow(
    mesh: Mesh, *, path: str, checkpoints: str, every: int, decay: float | None, lora: LoraConfig | None
) -> dict[str, Any]:
    """From the newest checkpoint, or the start, to the last step; saves at SAVE_AT.

    Returns:
        The first step, the digest of the copy after each step from then on, and, from the start, how far the copy is
        from what float64 says.
    """
    student = build_student(Path(path), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32, lora=lora)
    copy = TeacherCopy(student, every=every, decay=decay)
    optimizer = build_adamw(student, OptimizerConfig())
    directory = CheckpointDirectory(
        Path(checkpoints), student, optimizer, identity={}, steps=STEPS, keep=1, mesh=mesh, teacher_copy=copy
    )
    first = directory.restore()
    average = served = _doubles(_whole(without_aliases(student.weights())))
    digests, error = [_digest(_whole(copy.weights))], 0.0
    for done in range(first + 1, STEPS + 1):
        _learn(student, done)
        has_changed = copy.advance(done)
        now, held = _doubles(_whole(without_aliases(student.weights()))), _whole(copy.weights)
        average = now if decay is None else {n: decay * average[n] + (1 - decay) * now[n] for n in now}
        if done % every == 0:
            served = average
        assert has_changed is (done % every == 0)
        digests.append(_digest(held))
        error = max(error, _distance(_doubles(held), served))
        if done == SAVE_AT:
            directory.save(next_step=done)
    return {"first": first, "digests": digests, "error": error}


def _learn(student: Student, step: int) -> None:
    """Changes what is trained, element by element."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                own.add_(torch.cos(own * (step + 1)), alpha=0.1)  # also where it is 0


def _whole(weights: Mapping[str, StudentWeight]) -> dict[str, Tensor]:
    return {name: weight.whole(None) for name, weight in weights.items()}


def _doubles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in other)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    octets = [tensor.contiguous().reshape(-1).view(torch.uint8) for _, tensor in sorted(tensors.items())]
    return digest(torch.cat(octets).numpy().data).hex()


def test_a_copy_is_what_float64_says_and_goes_on_exactly_on_another_number_of_ranks(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    arguments = {"path": str(tiny_models.path(tie_word_embeddings=True)), "checkpoints": str(tmp_path)}
    target = "tests.numerics.test_trainer_teacher_copy:follow_each"
    [whole, other_rank] = run_ranks(target, ranks=2, **arguments)
    assert whole == other_rank
    [rest] = run_ranks(target, ranks=1, **arguments)
    for kind, one, later in zip(KINDS, whole, rest, strict=True):
        assert one["error"] < (1e-12 if kind["decay"] is None else 2e-6), kind
        assert (one["first"], later["first"]) == (0, SAVE_AT)
        assert later["digests"] == one["digests"][SAVE_AT:], kind
        changes = sum(a != b for a, b in zip(one["digests"], one["digests"][1:], strict=False))
        assert changes == STEPS // kind["every"]


@pytest.mark.parametrize("base", ["full", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_student_with_adapters_holds_them_added_up(
    kind: dict[str, Any], base: Literal["full", "nf4"], tiny_models: TinyModels, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    path = tiny_models.path(hidden_size=64, head_dim=16)  # 64 divides the inputs of every matrix
    arguments = {"path": str(path), "checkpoints": str(tmp_path), "lora": LoraConfig(rank=2, base=base), **kind}
    [outcome] = run_ranks("tests.numerics.test_trainer_teacher_copy:follow", ranks=1, **arguments)
    assert outcome["error"] < 2e-6
    assert len(set(outcome["digests"])) == 1 + STEPS // kind["every"]
