"""What a step refuses to do, and that it then leaves the student alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdmesh.errors import ModelMismatch, NotFinite, Unavailable
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sources.batches import StepBatch
from kdmesh_trainer.step import GradientStepper
from kdmesh_trainer.student.model import Student, release
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, Rows, build_stepper, build_student, random_sequences, step_batch

SEQUENCES = random_sequences(4, seed=1, vocabulary_size=310)
PLAN = [[0, 1], [2, 3]]


class Trainee:
    """A student with its teacher and stepper."""

    def __init__(self, mesh: Mesh, tiny_models: TinyModels, config: OptimizerConfig) -> None:
        self.mesh = mesh
        self.teacher = LocalTeacher(tiny_models.path("qwen3", seed=2))
        self.student: Student = build_student(
            tiny_models.path("qwen3", seed=1), mesh, vocabulary_size=310, compute_dtype=torch.float32
        )
        self.stepper: GradientStepper = build_stepper(self.student, self.teacher, mesh, config=config, steps=100)

    def batch(self) -> StepBatch:
        return step_batch(SEQUENCES, PLAN, self.teacher)

    def weights(self) -> list[Tensor]:
        release(self.student)
        values = [parameter.detach() for parameter in self.student.parameters()]
        return [v.full_tensor() if isinstance(v, DTensor) else v.clone() for v in values]


@pytest.fixture
def mesh_of_one() -> Iterator[Mesh]:
    with joined("cpu", longest_wait_s=10) as mesh:
        yield mesh


@pytest.fixture
def trainee(mesh_of_one: Mesh, tiny_models: TinyModels) -> Trainee:
    return Trainee(mesh_of_one, tiny_models, OptimizerConfig(learning_rate=1e-2))


def with_teacher(batch: StepBatch, *pending: object) -> StepBatch:
    micro_batches = zip(batch.micro_batches, pending, strict=True)
    return replace(batch, micro_batches=tuple(replace(m, teacher=rows) for m, rows in micro_batches))


def refuses_and_changes_nothing(trainee: Trainee, batch: StepBatch, error: type[Exception], match: str) -> None:
    before = trainee.weights()
    with pytest.raises(error, match=match):
        trainee.stepper.update(batch)
    assert all(torch.equal(now, then) for now, then in zip(trainee.weights(), before, strict=True))


def test_a_loss_that_is_not_finite_stops_at_its_step(trainee: Trainee) -> None:
    batch = replace(trainee.batch(), step=17)
    first, second = (m.teacher for m in batch.micro_batches)
    assert isinstance(first, Rows)
    broken = replace(first, rows_RD=first.rows_RD * torch.inf)
    refuses_and_changes_nothing(trainee, with_teacher(batch, broken, second), NotFinite, "step 17 has loss nan")
    # What the refused step left of its gradient must not leak into the next one.
    assert trainee.stepper.update(trainee.batch()).gradient_norm > 0


def test_a_step_never_mixes_weight_versions(trainee: Trainee) -> None:
    batch = trainee.batch()
    first, second = (m.teacher for m in batch.micro_batches)
    assert isinstance(second, Rows)
    mixed = with_teacher(batch, first, replace(second, weight_version=2))
    refuses_and_changes_nothing(trainee, mixed, ModelMismatch, "weight version 1 and 2")


def test_rows_that_do_not_come_end_the_step(trainee: Trainee) -> None:
    class Lost:
        def wait(self) -> Rows:
            raise Unavailable("the teacher has gone")

    batch = trainee.batch()
    first = batch.micro_batches[0].teacher
    refuses_and_changes_nothing(trainee, with_teacher(batch, first, Lost()), Unavailable, "the teacher has gone")


def test_the_head_follows_the_rows_to_a_new_version(trainee: Trainee) -> None:
    head = TeacherHead(trainee.teacher, vocabulary_size=310, device=trainee.mesh.device)
    first = head.at(1)
    assert head.at(1) is first
    assert first.vocabulary_size == 310
    trainee.teacher.version = 2
    assert head.at(1) is first, "rows of the old version may still be on their way"
    assert head.at(2) is not first
    with pytest.raises(ModelMismatch, match="rows have weight version 1, but the teacher's head has 2"):
        head.at(1)


def test_a_teachers_rows_are_not_kept(trainee: Trainee) -> None:
    import gc
    import weakref

    released = []

    class Borrowed:
        def __init__(self, rows: Rows) -> None:
            self._rows: Rows | None = rows

        def wait(self) -> Rows:
            rows, self._rows = self._rows, None
            assert rows is not None
            buffer_RD = rows.rows_RD.clone()
            weakref.finalize(buffer_RD.untyped_storage(), released.append, len(released))
            return replace(rows, rows_RD=buffer_RD)

    batch = trainee.batch()
    pending = [Borrowed(m.teacher) for m in batch.micro_batches if isinstance(m.teacher, Rows)]
    gc.disable()
    try:
        trainee.stepper.accumulate(with_teacher(batch, *pending))
        assert len(released) == len(PLAN)
    finally:
        gc.enable()


def test_a_gradient_is_cut_to_the_norm_of_the_configuration(mesh_of_one: Mesh, tiny_models: TinyModels) -> None:
    moments: dict[float | None, Tensor] = {}
    for longest in (None, 1e-3):
        config = OptimizerConfig(betas=(0.0, 0.95), max_gradient_norm=longest)
        trainee = Trainee(mesh_of_one, tiny_models, config)
        reported = trainee.stepper.update(trainee.batch()).gradient_norm
        kept = [state["exp_avg"] for state in trainee.stepper.optimizer.state.values()]
        whole = [moment.full_tensor() if isinstance(moment, DTensor) else moment for moment in kept]
        moments[longest] = torch.cat([moment.flatten() for moment in whole])
        assert reported == pytest.approx(float(moments[None].norm()), rel=1e-4)
    assert float(moments[1e-3].norm()) == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(moments[1e-3] / 1e-3, moments[None] / moments[None].norm(), rtol=1e-3, atol=1e-6)


def test_a_step_after_an_evaluation_trains_again(trainee: Trainee) -> None:
    trainee.student.eval()
    trainee.stepper.update(trainee.batch())
    assert all(module.training for module in trainee.student.modules())
