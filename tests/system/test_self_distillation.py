"""Jobs whose teacher is a copy of their student, or its moving average, with the real services."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.system.conftest import Materials
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 10
EVERY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs that learn from the data's tokens and from a teacher that follows them, each with a teacher of its own."""

    mirrored: Job  # the teacher is the student after every step; two ranks
    sampled: Job  # learns from its own samples what it thought of them itself; after that, with the same teacher
    mirror: Teacher  # of both, still serving
    undisturbed: Job  # the teacher is an average, and gets it every EVERY steps
    disturbed: Job  # of the same recipe; it and its teacher were killed
    first_trainer: Process
    second_trainer: Process
    average: Teacher  # of the disturbed job, the second process


def follows(**keys: Any) -> Mapping[str, Any]:
    return {"follows_student": keys}


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("self_distillation")
    objective = {"divergence": {"name": "forward_kl"}, "ce_weight": 1.0}
    recipe = replace(materials.plain, objective=objective, is_judged=True)
    teachers = [
        Teacher(processes, root / f"teacher-{name}", recipe.student, engine={"updatable": True})
        for name in ("mirror", "average", "other")
    ]
    mirror, average, other = teachers
    rollouts = Rollouts(processes, root / "rollouts", recipe.student)
    mirrored = Job(processes, root / "mirrored", recipe, mirror.address, teacher=follows(), steps=STEPS)
    averaged = follows(every=EVERY, decay=0.8)
    undisturbed, disturbed = (
        Job(processes, root / name, recipe, teacher.address, teacher=averaged, steps=STEPS)
        for name, teacher in (("undisturbed", average), ("disturbed", other))
    )
    source = {
        "kind": "on_policy",
        "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
        "sampling": {"max_new_tokens": 12},
        "max_staleness": 2,
    }
    on_policy = Job(
        processes,
        root / "on_policy",
        replace(materials.plain, objective={"divergence": {"name": "reverse_kl"}}),
        mirror.address,
        teacher=follows(every=2),
        steps=6,
        source=source,
    )
    for server in (*teachers, rollouts):
        server.start()
    running, followed = undisturbed.start(), mirrored.start_ranks(2)
    gate = disturbed.gate(30)  # between the checkpoints of steps 4 and 8
    first = disturbed.start()
    first.until(gate.is_reached)
    first.signal(signal.SIGKILL)
    first.exit_code()
    gate.let_go()
    other.process.signal(signal.SIGKILL)
    other.start()
    second = disturbed.start()
    followed.succeed()
    last = on_policy.start()
    for process in (running, second, last):
        process.succeed()
    return Story(
        mirrored=mirrored,
        sampled=on_policy,
        mirror=mirror,
        undisturbed=undisturbed,
        disturbed=disturbed,
        first_trainer=first,
        second_trainer=second,
        average=other,
    )


def test_a_student_differs_in_nothing_from_its_own_copy(story: Story) -> None:
    steps = story.mirrored.steps()
    assert len(steps) == STEPS
    assert steps[-1]["cross_entropy_nats_per_token"] < steps[0]["cross_entropy_nats_per_token"]
    for step in steps:
        assert abs(step["divergence_nats_per_token"]) < 1e-6
        assert step["top1_agreement"] > 0.99
    for line in story.mirrored.lines():
        if line["kind"] == "evaluation":
            assert abs(line["kl_nats_per_token"]) < 1e-6


def test_a_teacher_that_is_an_average_lags_behind_the_student(story: Story) -> None:
    divergences = [step["divergence_nats_per_token"] for step in story.undisturbed.steps()]
    assert abs(divergences[0]) < 1e-6  # they begin as the same
    assert min(divergences[1:]) > 1e-5
    assert divergences[EVERY - 1] > divergences[1]
    ages = [step["teacher_age_steps"] for step in story.undisturbed.steps()]
    assert ages == [step % EVERY for step in range(STEPS)]


def test_a_job_that_was_killed_with_its_teacher_learns_exactly_the_same(story: Story) -> None:
    assert len(story.undisturbed.steps()) == STEPS
    assert story.disturbed.record() == story.undisturbed.record()
    [event] = story.second_trainer.events("continuing from a checkpoint")
    assert event["step"] == 4  # between two updates of the teacher


def test_the_teacher_gets_the_copy_when_the_run_begins_and_whenever_that_changes(story: Story) -> None:
    published = [event["steps_done"] for event in story.first_trainer.events("weights published")]
    assert published in ([0, EVERY], [0, EVERY, 2 * EVERY])
    published = [event["steps_done"] for event in story.second_trainer.events("weights published")]
    assert published == [4, 6, 9]
    assert story.average.get("/v1/weights") == {"version": 4, "state": "serving"}  # it was started anew
    assert story.mirror.get("/v1/weights")["version"] == 1 + (1 + STEPS) + 4  # the second job goes on from the first


def test_one_head_is_left_of_all_that_the_teacher_had(story: Story) -> None:
    slab = story.mirror.get("/v1/slab")
    head_bytes = 320 * 32 * 4
    assert head_bytes <= slab["shared_bytes"] < 2 * head_bytes


def test_samples_are_scored_by_the_copy_that_their_step_is_trained_with(story: Story) -> None:
    steps = story.sampled.steps()
    assert len(steps) == 6
    for step in steps[::2]:  # the teacher has just been updated
        assert abs(step["divergence_nats_per_token"]) < 1e-6
    assert all(step["divergence_nats_per_token"] > 1e-8 for step in steps[3::2])
