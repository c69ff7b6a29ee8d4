"""A job whose ranks hold two copies of its student, in the host's memory, with the real services."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.system.conftest import Materials
from tests.system.processes import Process, Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS, EVERY = 14, 3
TWO_COPIES = {"shard_ranks": 2, "offload": "all"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs of one recipe, each with a teacher of its own that is the moving average of its student."""

    alone: Job  # one rank
    copied: Job  # four ranks in two copies
    killed: Job  # likewise; one of its ranks was killed
    again: Process  # its second launcher


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("parallel")
    objective = {"divergence": {"name": "forward_kl"}, "ce_weight": 1.0}
    recipe = replace(materials.plain, objective=objective, is_judged=True)
    follows = {"follows_student": {"every": EVERY, "decay": 0.8}}
    jobs = []
    for name, parallel in (("alone", {}), ("copied", TWO_COPIES), ("killed", TWO_COPIES)):
        teacher = Teacher(processes, root / f"teacher-{name}", recipe.student, engine={"updatable": True})
        teacher.start()
        jobs.append(
            Job(processes, root / name, recipe, teacher.address, teacher=follows, steps=STEPS, parallel=parallel)
        )
    alone, copied, killed = jobs
    for process in (alone.start(), copied.start_ranks(4)):
        process.succeed()
    first = killed.start_ranks(4)
    first.until(lambda: len(killed.steps()) >= 6)
    psutil.Process(first.pid).children()[0].kill()
    first.exit_code()
    again = killed.start_ranks(4)
    again.succeed()
    return Story(alone=alone, copied=copied, killed=killed, again=again)


def weights(job: Job) -> Path:
    return job.output / "final" / "model.safetensors"


def test_four_ranks_in_two_copies_learn_what_one_does(story: Story) -> None:
    ours, others = story.copied.lines(), story.alone.lines()
    assert [line["kind"] for line in ours] == [line["kind"] for line in others]
    for ours_line, other in zip(ours, others, strict=True):
        for key in ("loss_nats_per_token", "gradient_norm", "kl_nats_per_token", "cross_entropy_nats_per_token"):
            if key in other:
                assert ours_line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (other["step"], key)


def test_a_job_that_was_killed_learns_exactly_the_same(story: Story) -> None:
    assert {event["step"] for event in story.again.events("continuing from a checkpoint")} <= {4, 8}
    assert len(story.copied.steps()) == STEPS
    assert story.killed.record() == story.copied.record()
    assert weights(story.killed).read_bytes() == weights(story.copied).read_bytes()


def test_its_model_is_whole(story: Story) -> None:
    ours, others = load_file(weights(story.copied)), load_file(weights(story.alone))
    assert ours.keys() == others.keys()
    for name, tensor in others.items():
        assert (ours[name] - tensor).norm() < 1e-3 * tensor.norm(), name
