"""Several jobs on one teacher, one of which is killed, learn exactly what each learns alone."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import psutil
import pytest

from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Process, Processes
from tests.system.teachers import Teacher
from tests.system.training import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Three jobs on one teacher, each held in the middle of a step. One of them, with two ranks, loses a rank."""

    plain: Job
    other: Job
    killed: Job  # killed at `call`, then continued
    whole: Job  # the same, never killed, with a teacher of its own
    call: int
    slots_before: dict[str, list[int]]
    slots_after: dict[str, list[int]]
    freed_after_s: float  # from the kill to the end of the rank's session
    launcher: Process


@pytest.fixture(scope="module")
def story(
    materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    root, teacher = tmp_path_factory.mktemp("shared"), undisturbed.teacher
    plain = Job(processes, root / "plain-shared", materials.plain, teacher.address)
    other = Job(processes, root / "other-shared", materials.other, teacher.address)
    killed = Job(processes, root / "killed", materials.plain, teacher.address, checkpoint={"every": 2})
    whole = Job(processes, root / "whole", materials.plain, undisturbed.spare.address)
    call = random.randint(3, 20)
    gates = [plain.gate(20), other.gate(10), killed.gate(call)]
    running = [plain.start(), other.start(), killed.start_ranks(2)]
    undisturbed_ranks = whole.start_ranks(2)
    for process, gate in zip(running, gates, strict=True):
        process.until(gate.is_reached)
    # Each keeps what it works on; what was prefetched is soon copied to its own memory.
    running[0].until(lambda: teacher.slots("plain-shared") == teacher.slots("other-shared") == [1])
    first, second = _ranks(running[2])
    second.suspend()  # it would end its own session as soon as it hears of the other's death
    slots_before = {job: teacher.slots(job) for job in ("plain-shared", "other-shared", "killed")}
    freed_after_s = _kill(first, teacher)
    slots_after = {job: teacher.slots(job) for job in slots_before}
    second.resume()
    gates[2].remove()
    for gate in gates[:2]:
        gate.let_go()
    running[2].exit_code()
    again = killed.start_ranks(2)
    for process in (*running[:2], undisturbed_ranks, again):
        process.succeed()
    return Story(
        plain=plain,
        other=other,
        killed=killed,
        whole=whole,
        call=call,
        slots_before=slots_before,
        slots_after=slots_after,
        freed_after_s=freed_after_s,
        launcher=running[2],
    )


def _ranks(launcher: Process) -> list[psutil.Process]:
    """The processes that it started, by rank."""
    return sorted(psutil.Process(launcher.pid).children(), key=lambda child: int(child.environ()["RANK"]))


def _kill(rank: psutil.Process, teacher: Teacher) -> float:
    """Seconds until the teacher has ended its session."""
    sessions = len(teacher.slots("killed"))
    rank.kill()
    killed_s = time.monotonic()
    while len(teacher.slots("killed")) == sessions:
        assert time.monotonic() < killed_s + 60
    return time.monotonic() - killed_s


def test_slots_of_a_killed_rank_are_back_within_a_second(story: Story) -> None:
    assert (len(story.slots_before["killed"]), len(story.slots_after["killed"])) == (2, 1)
    assert sum(story.slots_before["killed"]) > sum(story.slots_after["killed"])
    assert story.freed_after_s < 1


def test_job_that_loses_a_rank_ends_and_names_it(story: Story) -> None:
    assert story.launcher.exit_code() == 1
    assert "Error: trainer rank 0 was killed by SIGKILL" in story.launcher.words()


def test_job_killed_at_any_step_continues_exactly(story: Story) -> None:
    assert story.killed.record() == story.whole.record(), f"killed at call {story.call}"
    assert len(story.killed.steps()) == 16


def test_different_jobs_held_slots_at_the_same_time(story: Story) -> None:
    for job in ("plain-shared", "other-shared"):
        assert story.slots_before[job] == story.slots_after[job] == [1]


def test_each_job_learns_what_it_learns_alone(story: Story, undisturbed: Undisturbed) -> None:
    assert story.plain.record() == undisturbed.plain.record()
    assert story.other.record() == undisturbed.other.record()
