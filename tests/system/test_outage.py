"""Services that go for good in the middle of a step: the steps before it are kept, on every rank."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Materials
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

STEPS = 12
# Draws at random: a step that is done again must draw the same.
DROPOUT = {"lora": {"rank": 4, "dropout": 0.3}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs that write no checkpoint on the way. Their teacher is killed in a step of each, and comes back late."""

    undisturbed: Job
    hasty: Job  # on two ranks; gives up after a while
    hasty_launcher: Process
    hasty_kept: int  # steps that it had done then
    stopped: Job  # is told to stop while its teacher is away; continued when it is back
    stopped_trainer: Process
    stopped_kept: int
    continued: Process


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("outage")
    teacher, other = (Teacher(processes, root / name, materials.teacher) for name in ("teacher", "other"))
    student = {"model": str(materials.plain.student), "device": "cpu", **DROPOUT}

    def job(name: str, address: str, **more: Any) -> Job:
        sections = {"student": student, "steps": STEPS, "checkpoint": {}}
        return Job(processes, root / name, materials.plain, address, teacher={"prefetch": 1, **more}, **sections)

    undisturbed = job("undisturbed", other.address)
    hasty = job("hasty", teacher.address, deadline_s=4)
    stopped = job("stopped", teacher.address, deadline_s=3600)
    gates = {one: one.gate(12) for one in (hasty, stopped)}
    teacher.start()
    other.start()
    teacher.wait_ready()
    launcher, trainer, alone = hasty.start_ranks(2), stopped.start(), undisturbed.start()
    launcher.until(gates[hasty].is_reached)
    trainer.until(gates[stopped].is_reached)
    teacher.process.signal(signal.SIGKILL)
    teacher.process.exit_code()
    trainer.signal(signal.SIGTERM)
    for gate in gates.values():
        gate.let_go()
    for process in (trainer, launcher, alone):
        process.exit_code()
    kept = {one: len(one.steps()) for one in (hasty, stopped)}
    teacher.start()
    teacher.wait_ready()
    continued = stopped.start()
    continued.succeed()
    return Story(
        undisturbed=undisturbed,
        hasty=hasty,
        hasty_launcher=launcher,
        hasty_kept=kept[hasty],
        stopped=stopped,
        stopped_trainer=trainer,
        stopped_kept=kept[stopped],
        continued=continued,
    )


def checkpoints(job: Job) -> list[str]:
    return sorted(path.name for path in (job.output / "checkpoints").iterdir())


def test_a_job_whose_teacher_stays_away_ends_with_its_steps_in_a_checkpoint(story: Story) -> None:
    assert story.hasty_launcher.exit_code() == 3
    assert story.hasty_kept > 0
    assert checkpoints(story.hasty) == [f"step-{story.hasty_kept:08d}"]
    [said] = [line for line in story.hasty_launcher.words() if line.startswith("Error")]
    assert "within 4" in said


def test_a_job_that_is_stopped_while_its_teacher_is_away_keeps_its_steps_and_waits_no_longer(story: Story) -> None:
    story.stopped_trainer.succeed()
    assert story.stopped_kept > 0
    [stopped] = story.stopped_trainer.events("stopped")
    assert stopped["steps_done"] == story.stopped_kept
    assert not story.stopped_trainer.words()


def test_the_step_that_was_lost_is_done_again_exactly(story: Story) -> None:
    [continued] = story.continued.events("continuing from a checkpoint")
    assert continued["step"] == story.stopped_kept
    assert story.stopped.record() == story.undisturbed.record()
    assert len(story.stopped.steps()) == STEPS


def test_a_job_that_is_stopped_while_nobody_samples_keeps_its_steps(
    materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    teacher = Teacher(processes, tmp_path / "teacher", materials.teacher)
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student, can_be_held=True)
    source = {
        "kind": "on_policy",
        "rollouts": {"addresses": [rollouts.address], "deadline_s": 3600},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 8},
    }
    recipe = replace(materials.plain, is_judged=False)
    job = Job(processes, tmp_path / "job", recipe, teacher.address, source=source, steps=10_000, checkpoint={})
    teacher.start()
    rollouts.start()
    trainer = job.start_ranks(2)
    trainer.until(lambda: len(job.steps()) >= 2)
    rollouts.hold()
    trainer.signal(signal.SIGTERM)
    trainer.succeed()
    assert checkpoints(job) == [f"step-{len(job.steps()):08d}"]
