"""A teacher with room for a single answer: who waits for it, how long, and what a job does that lost its place."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import numpy as np
import pytest

from kdmesh.rpc.teacher_pool import TeacherPool
from kdmesh.types import TokenSequence
from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

SEQUENCES = [TokenSequence(token_ids=np.array([5, 6, 7], np.int32), positions=np.array([0, 1], np.int32))]


@pytest.fixture(scope="module")
def teacher(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    slab = {"slots": 1, "lease_s": 2.0}
    narrow = Teacher(
        processes,
        tmp_path_factory.mktemp("narrow") / "teacher",
        materials.teacher,
        slab=slab,
        queue={"max_wait_s": 2.0},
    )
    narrow.start()
    return narrow


def test_stopped_job_loses_its_credit_and_nothing_else(
    teacher: Teacher, materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path: Path
) -> None:
    job = Job(processes, tmp_path / "stopped", materials.plain, teacher.address)
    gate = job.gate(20)
    trainer = job.start()
    trainer.until(gate.is_reached)
    assert teacher.get("/v1/slab")["slots"]["held"] == 1
    with TeacherPool([teacher.address], job="next", deadline_s=60) as pool:
        pending = pool.submit(SEQUENCES)
        trainer.signal(signal.SIGSTOP)
        rows = pending.wait()  # in the slot that the stopped one had
        assert rows.rows_RD.shape == (2, 48)
        assert teacher.slots("stopped") == []
        assert teacher.get("/v1/slab")["orphans"] == 1  # memory that the stopped one still maps
        del rows
    trainer.signal(signal.SIGCONT)
    gate.let_go()
    trainer.succeed()
    assert job.record() == undisturbed.plain.record()
    assert trainer.events("teacher lost")
    trainer_ended = teacher.get("/v1/slab")
    assert (trainer_ended["orphans"], trainer_ended["slots"]["free"]) == (0, 1)


def test_job_waits_for_a_slot_no_longer_than_its_deadline_and_says_why(
    teacher: Teacher, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    job = Job(processes, tmp_path / "starved", materials.plain, teacher.address, teacher={"deadline_s": 4})
    with TeacherPool([teacher.address], job="greedy", deadline_s=60) as pool:
        kept = pool.submit(SEQUENCES).wait()
        trainer = job.start()
        assert trainer.exit_code() == 2
        del kept
    (sentence,) = trainer.words()
    assert re.search(r"within 4 s \(.*no slot came free; of 1 slots are 1 held", sentence)
    assert not job.lines()
