"""Whole jobs whose output heads are spread over two ranks by tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

SPREAD = {"head": "vocabulary"}


@pytest.fixture(scope="module")
def teacher(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    teacher = Teacher(processes, tmp_path_factory.mktemp("spread") / "teacher", materials.teacher)
    teacher.start()
    return teacher


def test_a_job_learns_what_it_learns_with_whole_heads_and_continues_exactly(
    teacher: Teacher, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    whole, spread, continued = (
        Job(
            processes,
            tmp_path / name,
            materials.other,
            teacher.address,
            teacher={"prefetch": 1},
            steps=8,
            parallel={} if name == "whole" else SPREAD,
        )
        for name in ("whole", "spread", "continued")
    )
    for trainer in [whole.start_ranks(2), spread.start_ranks(2), continued.start_ranks(2, "steps=4")]:
        trainer.succeed()
    again = continued.start_ranks(2)
    again.succeed()
    figures = ("loss_nats_per_token", "divergence_nats_per_token", "cross_entropy_nats_per_token", "gradient_norm")
    for theirs, mine in zip(whole.steps(), spread.steps(), strict=True):
        assert [mine[name] for name in figures] == pytest.approx([theirs[name] for name in figures], rel=1e-3)
    assert [step["loss_nats_per_token"] for step in continued.steps()] == [
        step["loss_nats_per_token"] for step in spread.steps()
    ]
    scores = [
        [line["kl_nats_per_token"] for line in job.lines() if line["kind"] == "evaluation"] for job in (whole, spread)
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    exported = [load_file(job.output / "final" / "model.safetensors") for job in (whole, spread)]
    assert exported[0].keys() == exported[1].keys()
    for name, tensor in exported[0].items():
        assert (exported[1][name] - tensor).norm() < 1e-2 * tensor.norm(), name


def test_samples_come_from_the_student_that_is_trained(
    teacher: Teacher, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    rollouts.start()
    source = {
        "kind": "on_policy",
        "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
        "sampled_fraction": 0.7,
        "sampling": {"max_new_tokens": 16},
    }
    job = Job(
        processes,
        tmp_path / "job",
        materials.plain,
        teacher.address,
        objective={"name": "distill", "divergence": {"name": "reverse_kl"}, "ce_weight": 0.1},
        source=source,
        steps=4,
        evaluation={},
        parallel=SPREAD,
    )
    job.start_ranks(2).succeed()
    assert len(job.steps()) == 4
    for step in job.steps():
        assert abs(step["sampler_kl_k1_nats"]) < 1e-5
        assert 0 < step["topk_overlap"] < 1
        assert 0 < step["student_entropy_nats"] < 6
        assert 0 < step["teacher_entropy_nats"] < 6
    assert rollouts.weight_version() == 5


def test_ranks_that_wait_for_each_other_keep_no_slot_from_each_other(
    materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    narrow = Teacher(processes, tmp_path / "teacher", materials.teacher, slab={"slots": 1})
    narrow.start()
    job = Job(
        processes,
        tmp_path / "job",
        materials.plain,
        narrow.address,
        teacher={"door": "shm", "deadline_s": 30},
        steps=4,
        parallel=SPREAD,
    )
    job.start_ranks(2).succeed()
    assert len(job.steps()) == 4
