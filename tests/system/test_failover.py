"""A teacher that dies in the middle of a step costs nothing when there is another."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Processes
from tests.system.teachers import Teacher
from tests.system.training import Job


def test_job_goes_on_with_the_other_teacher_and_learns_exactly_the_same(
    materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path: Path
) -> None:
    victim, survivor = Teacher(processes, tmp_path / "victim", materials.teacher), undisturbed.teacher
    # At equal load the first one is asked.
    job = Job(processes, tmp_path / "orphaned", materials.plain, victim.address, survivor.address)
    call, prefetch = 14, 4
    start, first, second = job.gate(1), job.gate(call), job.gate(call + 2)
    victim.start()
    trainer = job.start()
    trainer.until(start.is_reached)
    victim.wait_ready()
    trainer.until(lambda: victim.slots("orphaned"))
    start.let_go()
    trainer.until(first.is_reached)
    trainer.until(lambda: victim.num_answered("orphaned") + survivor.num_answered("orphaned") == call + prefetch)
    answered = victim.num_answered("orphaned")
    assert answered > 0
    victim.process.signal(signal.SIGSTOP)
    # Enough rows are here for two more micro-batches. Those ask for two more, and the idle victim is asked first.
    first.let_go()
    trainer.until(second.is_reached)
    victim.process.signal(signal.SIGKILL)
    second.let_go()
    trainer.succeed()
    assert job.record() == undisturbed.plain.record()
    assert [event["address"] for event in trainer.events("server lost")] == [victim.address]
    # What the victim did not answer was asked once more.
    assert survivor.num_answered("orphaned") == undisturbed.plain_requests - answered
