"""Traces of chosen steps, and that a step reads no number off its device before it is over."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.reporting.profiler import TraceWriter
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.profile_config import ProfileConfig
from kdmesh_trainer.step import GradientStepper
from tests.support.device_reads import Reads
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

pytestmark = pytest.mark.slow

HERE = "tests.numerics.test_trainer_profile"
VOCABULARY_SIZE = 310
SEQUENCES = random_sequences(6, seed=3, vocabulary_size=VOCABULARY_SIZE)
PLANS = [[[0, 1], [2]], [[3], [4, 5]]]
OF_EACH_MICRO_BATCH = ("pack", "body", "wait for the teacher", "head and loss", "backward")
ONCE = ("gradient norm", "figures of all ranks", "optimizer")


def stepper_of(mesh: Mesh, student: str, teacher: LocalTeacher) -> GradientStepper:
    model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    return build_stepper(model, teacher, mesh, config=OptimizerConfig(), steps=3)


def traced(mesh: Mesh, *, student: str, teacher: str, output: str) -> list[float]:
    """Losses of three steps, of which the second is traced; runs on every rank."""
    local_teacher = LocalTeacher(Path(teacher))
    stepper = stepper_of(mesh, student, local_teacher)
    writer = TraceWriter(ProfileConfig(steps=(1,), shapes=True), output=Path(output), mesh=mesh)
    losses = []
    for step in range(3):
        batch = step_batch(SEQUENCES, PLANS[mesh.rank], local_teacher, step=step)
        with writer.watching(step):
            losses.append(stepper.update(batch).loss_nats_per_token)
    return losses


def test_each_rank_writes_a_trace_of_each_chosen_step_that_names_its_parts(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    paths = {"student": str(tiny_models.path(seed=1)), "teacher": str(tiny_models.path(seed=2))}
    run_ranks(f"{HERE}:traced", ranks=2, output=str(tmp_path), **paths)
    stems = [f"step-00000001-rank-{rank}" for rank in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == sorted(
        f"{stem}{suffix}" for stem in stems for suffix in (".json.gz", ".txt")
    )
    for stem in stems:
        with gzip.open(tmp_path / "profile" / f"{stem}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        named = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
        assert {name: named[name] for name in OF_EACH_MICRO_BATCH} == dict.fromkeys(OF_EACH_MICRO_BATCH, 2)
        assert {name: named[name] for name in ONCE} == dict.fromkeys(ONCE, 1)
        assert any("Input Dims" in event.get("args", {}) for event in events)
        assert "head and loss" in (tmp_path / "profile" / f"{stem}.txt").read_text()


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    config = ProfileConfig(steps=(1,), directory=tmp_path / "file" / "profile")
    with joined("cpu", longest_wait_s=60) as mesh, TraceWriter(config, output=tmp_path, mesh=mesh).watching(1):
        pass
    (told,) = [entry.__dict__ for entry in caplog.records if entry.getMessage() == "step not traced"]
    assert "Not a directory" in told["why"]


def test_a_step_that_there_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="steps has -1: steps are counted from 0"):
        ProfileConfig(steps=(3, -1))


def test_no_number_is_read_before_the_step_is_over(tiny_models: TinyModels) -> None:
    with joined("cpu", longest_wait_s=60) as mesh:
        teacher = LocalTeacher(tiny_models.path(seed=2))
        stepper = stepper_of(mesh, str(tiny_models.path(seed=1)), teacher)
        batch = step_batch(SEQUENCES, [[0, 1], [2], [3, 4, 5]], teacher)
        stepper.accumulate(batch)  # the teacher's head is fetched
        with Reads() as reads:
            stepper.accumulate(batch)
        # The factor of the backward pass, for both gradients of each micro-batch, which is looked at on a CPU alone
        # (losses/matmul.py).
        assert reads.seen == ["_local_scalar_dense.default"] * 6
