"""A student that one rank keeps whole: it learns as FSDP would have it, bit for bit, and is itself between steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.saving.checkpoint import CheckpointDirectory
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.step import GradientStepper
from kdmesh_trainer.stop import Stopping
from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.student.weights import whole
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch

VOCABULARY_SIZE = 310
SEQUENCES = random_sequences(6, seed=3, vocabulary_size=VOCABULARY_SIZE)
LONGEST = max(sequence.num_tokens for sequence in SEQUENCES)
PLAN = [[0, 1, 3], [2], [4, 5]]
CONFIG = OptimizerConfig(learning_rate=1e-2, schedule="constant", max_gradient_norm=0.5)


@pytest.fixture
def mesh_of_one() -> Iterator[Mesh]:
    with joined("cpu", longest_wait_s=10) as mesh:
        yield mesh


@pytest.fixture
def teacher(tiny_models: TinyModels) -> LocalTeacher:
    return LocalTeacher(tiny_models.path("qwen3", seed=2))


def built(
    mesh: Mesh, tiny_models: TinyModels, teacher: LocalTeacher, dtype: torch.dtype, gather: Gather, *, is_tied: bool
) -> tuple[Student, GradientStepper]:
    path = tiny_models.path("qwen3", seed=1, tie_word_embeddings=is_tied)
    student = build_student(path, mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=dtype, gather=gather)
    return student, build_stepper(student, teacher, mesh, config=CONFIG, steps=5)


def evaluator_of(student: Student, mesh: Mesh) -> HeldOutEvaluator:
    return HeldOutEvaluator(
        student, SEQUENCES, teacher=None, teacher_head=None, prefetch=1, max_tokens=LONGEST, mesh=mesh
    )


class AfterOne:
    """A wish to stop that comes with the second micro-batch."""

    def __init__(self) -> None:
        self._times = 0

    def is_wanted(self) -> bool:
        self._times += 1
        return self._times > 1


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_as_fsdp_would_have_it(
    mesh_of_one: Mesh, tiny_models: TinyModels, teacher: LocalTeacher, dtype: torch.dtype, is_tied: bool
) -> None:
    outcomes = []
    for gather in ("auto", "micro_batch"):
        student, stepper = built(mesh_of_one, tiny_models, teacher, dtype, gather, is_tied=is_tied)
        assert isinstance(student, FSDPModule) is (gather == "micro_batch")
        losses = [stepper.update(step_batch(SEQUENCES, PLAN, teacher, step=n)).loss_nats_per_token for n in range(5)]
        release(student)
        outcomes.append((losses, {name: whole(p.detach(), None) for name, p in student.named_parameters()}))
    (losses, weights), (expected_losses, expected) = outcomes
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]


def test_it_has_its_own_parameters_between_steps_and_computes_with_what_they_have_become(
    mesh_of_one: Mesh, tiny_models: TinyModels, teacher: LocalTeacher
) -> None:
    student, stepper = built(mesh_of_one, tiny_models, teacher, torch.bfloat16, "auto", is_tied=True)
    own = dict(student.named_parameters())
    evaluator = evaluator_of(student, mesh_of_one)
    losses = []
    for step in range(3):
        losses.append(evaluator.evaluate().cross_entropy_nats_per_token)
        stepper.update(step_batch(SEQUENCES, PLAN, teacher, step=step))
        now = dict(student.named_parameters())
        assert now.keys() == own.keys()
        assert all(now[name] is parameter and parameter.grad is None for name, parameter in own.items())
    assert len(set(losses)) == 3


def directory_of(path: Path, student: Student, stepper: GradientStepper, mesh: Mesh) -> CheckpointDirectory:
    return CheckpointDirectory(path, student, stepper.optimizer, identity={}, steps=5, keep=1, mesh=mesh)


@pytest.mark.parametrize(("first", "second"), [("auto", "micro_batch"), ("micro_batch", "auto")])
def test_a_run_goes_on_whole_from_what_fsdp_saved_and_the_other_way(
    mesh_of_one: Mesh, tiny_models: TinyModels, teacher: LocalTeacher, tmp_path: Path, first: Gather, second: Gather
) -> None:
    saved, restored = (
        built(mesh_of_one, tiny_models, teacher, torch.bfloat16, gather, is_tied=True) for gather in (first, second)
    )
    for step in range(2):
        saved[1].update(step_batch(SEQUENCES, PLAN, teacher, step=step))
    directory_of(tmp_path, *saved, mesh_of_one).save(next_step=2)
    assert directory_of(tmp_path, *restored, mesh_of_one).restore() == 2
    later = [stepper.update(step_batch(SEQUENCES, PLAN, teacher, step=2)) for _, stepper in (saved, restored)]
    assert later[1].loss_nats_per_token == pytest.approx(later[0].loss_nats_per_token, rel=1e-6)
    for student, _ in (saved, restored):
        release(student)
    pairs = zip(saved[0].parameters(), restored[0].parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(whole(one, None), whole(other, None), rtol=1e-4, atol=1e-5)


def test_what_is_saved_after_an_evaluation_that_was_stopped_are_its_own_parameters(
    mesh_of_one: Mesh, tiny_models: TinyModels, teacher: LocalTeacher, tmp_path: Path
) -> None:
    saved, restored = (built(mesh_of_one, tiny_models, teacher, torch.bfloat16, "auto", is_tied=True) for _ in range(2))
    saved[1].update(step_batch(SEQUENCES, PLAN, teacher))
    weights = {name: parameter.detach().clone() for name, parameter in saved[0].named_parameters()}
    with pytest.raises(Stopping):
        evaluator_of(saved[0], mesh_of_one).evaluate(stop=AfterOne())
    directory_of(tmp_path, *saved, mesh_of_one).save(next_step=1)
    assert directory_of(tmp_path, *restored, mesh_of_one).restore() == 1
    for student in (saved[0], restored[0]):
        assert all(torch.equal(weights[name], parameter) for name, parameter in student.named_parameters())


def test_a_pass_that_is_broken_off_leaves_what_the_next_one_repairs(
    mesh_of_one: Mesh, tiny_models: TinyModels, teacher: LocalTeacher
) -> None:
    outcomes = []
    for breaks_off in (False, True):
        _, stepper = built(mesh_of_one, tiny_models, teacher, torch.bfloat16, "auto", is_tied=False)
        batch = step_batch(SEQUENCES, PLAN, teacher)
        if breaks_off:
            broken = step_batch(SEQUENCES, PLAN, teacher, step=1)
            object.__setattr__(broken.micro_batches[1], "teacher", None)
            with pytest.raises(AssertionError):
                stepper.update(broken)
        outcomes.append(stepper.update(batch).gradient_norm)
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-6)
