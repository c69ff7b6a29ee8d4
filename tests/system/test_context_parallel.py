"""Jobs whose ranks hold rows of tokens together learn what one rank learns, and ask their teacher for no more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.conftest import Materials
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 8
# 192 tokens and 4 sequences: what comes to two ranks together is what comes to one alone.
BATCH = {"sequences": 4, "max_tokens": 192}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs of one recipe on one teacher."""

    alone: Job  # on one rank
    whole: Job  # on two that hold each row together
    keys: Job  # the same, which exchange keys instead of heads
    killed: Job  # the same, killed and continued
    again: Process  # what continued it
    groups: Job  # on two times two
    teacher: Teacher


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root, recipe = tmp_path_factory.mktemp("together"), replace(materials.plain, is_judged=True)
    teacher = Teacher(processes, root / "teacher", materials.teacher)
    teacher.start()

    def job(name: str, **parallel: Any) -> Job:
        sections = {"batch": BATCH, "steps": STEPS, "evaluation": {"every": 4}, "checkpoint": {"every": 2}}
        return Job(processes, root / name, recipe, teacher.address, parallel=parallel, **sections)

    alone, whole, killed, groups = (
        job(name, context=context) for name, context in (("alone", 1), ("whole", 2), ("killed", 2), ("groups", 2))
    )
    keys = job("keys", context=2, context_exchange="keys")
    for running in (alone.start(), whole.start_ranks(2), keys.start_ranks(2)):
        running.succeed()
    first = killed.start_ranks(2)
    first.until(lambda: len(killed.steps()) >= 5)
    psutil.Process(first.pid).children()[0].kill()
    first.exit_code()
    again = killed.start_ranks(2)
    again.succeed()
    groups.start_ranks(4).succeed()
    return Story(alone=alone, whole=whole, keys=keys, killed=killed, again=again, groups=groups, teacher=teacher)


def figures(job: Job, *names: str) -> list[float]:
    """Of every step and evaluation that has them, in order."""
    return [line[name] for line in job.lines() for name in names if name in line]


def test_ranks_that_hold_rows_together_learn_what_one_rank_learns(story: Story) -> None:
    names = ("loss_nats_per_token", "top1_agreement", "gradient_norm", "num_tokens", "kl_nats_per_token")
    expected = figures(story.alone, *names)
    assert len(story.alone.steps()) == STEPS
    for job in (story.whole, story.keys, story.groups):
        assert figures(job, *names) == pytest.approx(expected, rel=1e-3)
    losses = figures(story.whole, "loss_nats_per_token")
    assert losses[-1] < losses[0]


def test_a_job_that_was_killed_continues_with_equal_losses(story: Story) -> None:
    (event, *_) = story.again.events("continuing from a checkpoint")
    assert event["step"] > 0
    assert story.killed.record() == story.whole.record()


def test_a_teacher_reads_every_token_once_however_many_ranks_hold_it(story: Story) -> None:
    read = story.teacher.num_prefilled("alone")
    assert read > 0
    assert [story.teacher.num_prefilled(name) for name in ("whole", "keys", "groups")] == [read] * 3


def test_samples_of_all_ranks_are_trained_on_together(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    jobs = []
    for name, context in (("alone", 1), ("whole", 2)):
        rollouts = Rollouts(processes, tmp_path / f"rollouts-{name}", materials.plain.student)
        rollouts.start()
        source = {
            "kind": "on_policy",
            "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 24},
        }
        jobs.append(
            Job(
                processes,
                tmp_path / name,
                materials.plain,
                story.teacher.address,
                source=source,
                batch=BATCH,
                steps=2,
                parallel={"context": context},
            )
        )
    alone, together = jobs
    for running in (alone.start(), together.start_ranks(2)):
        running.succeed()
    # Of the first step alone: after an update that differs in its last bit, samples may differ.
    for name in ("loss_nats_per_token", "student_entropy_nats", "num_tokens", "response_tokens_mean"):
        assert together.steps()[0][name] == pytest.approx(alone.steps()[0][name], rel=1e-4)
    assert abs(together.steps()[0]["sampler_kl_k1_nats"]) < 1e-4


def test_heads_that_ranks_cannot_share_are_refused_before_anything_loads(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    parallel = {"context": 3, "context_exchange": "heads"}
    job = Job(processes, tmp_path / "refused", materials.plain, story.teacher.address, parallel=parallel)
    refused = job.start_ranks(3)
    assert refused.exit_code() != 0
    assert any("parallel.context is 3" in line and "has 4 attention heads" in line for line in refused.words())
    assert not refused.events("student loaded")
