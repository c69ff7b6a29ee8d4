"""Teachers with little room: who waits for a single slot, and for a teacher that came back with too small a one."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence
from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

ROWS = 1900
"""More than an answer to the job below has, so that nothing in a slot is spared."""


def sequences() -> list[TokenSequence]:
    """One request for that many rows."""
    return [
        TokenSequence(token_ids=np.arange(96, dtype=np.int32) + k, positions=np.arange(95, dtype=np.int32))
        for k in range(ROWS // 95)
    ]


@pytest.fixture(scope="module")
def teacher(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    narrow = Teacher(
        processes,
        tmp_path_factory.mktemp("narrow") / "teacher",
        materials.teacher,
        slab={"slots": 1, "slot_mib": 1, "lease_s": 2.0},
        queue={"max_wait_s": 2.0},
    )
    narrow.start()
    return narrow


def test_stopped_job_loses_its_credit_and_nothing_else(
    teacher: Teacher, materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path: Path
) -> None:
    # A step is one micro-batch of about 1800 rows, of which the loss reads no more than 1024 before the gate.
    large: dict[str, Any] = {"batch": {"sequences": 60, "max_tokens": 8192}, "steps": 4}
    job = Job(processes, tmp_path / "stopped", materials.plain, teacher.address, **large)
    whole = Job(processes, tmp_path / "whole", materials.plain, undisturbed.spare.address, **large)
    gate = job.gate(1)
    trainer, other = job.start(), whole.start()
    trainer.until(gate.is_reached)
    assert teacher.get("/v1/slab")["slots"]["held"] == 1
    with TeacherPool([teacher.address], job="next", deadline_s=60) as pool:
        pending = pool.submit(sequences())
        trainer.signal(signal.SIGSTOP)
        rows = pending.wait()  # in the slot that the stopped one had
        assert rows.rows_RD.shape == (ROWS, 48)
        assert teacher.slots("stopped") == []
        assert teacher.get("/v1/slab")["orphans"] == 1  # memory that the stopped one still maps
        del rows
    trainer.signal(signal.SIGCONT)
    gate.let_go()
    trainer.succeed()
    other.succeed()
    assert job.record() == whole.record()
    assert 1500 < job.steps()[0]["num_loss_tokens"] < ROWS
    assert trainer.events("server lost")
    slab = teacher.get("/v1/slab")
    assert (slab["orphans"], slab["slots"]["free"]) == (0, 1)


def test_job_waits_for_a_slot_no_longer_than_its_deadline_and_says_why(
    teacher: Teacher, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    job = Job(processes, tmp_path / "starved", materials.plain, teacher.address, teacher={"deadline_s": 4})
    with TeacherPool([teacher.address], job="greedy", deadline_s=60) as pool:
        kept = pool.submit(sequences()).wait()
        trainer = job.start()
        assert trainer.exit_code() == 3
        del kept
    (sentence,) = trainer.words()
    assert re.search(r"within 4 s \(.*no slot came free; of 1 slots are 1 held", sentence)
    assert not job.lines()


def test_job_waits_while_its_only_teacher_is_back_with_too_little_for_its_sequences(
    materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path: Path
) -> None:
    teacher = Teacher(processes, tmp_path / "teacher", materials.teacher)
    job = Job(processes, tmp_path / "waiting", materials.plain, teacher.address)
    gate = job.gate(3)
    teacher.start()
    trainer = job.start()
    trainer.until(gate.is_reached)
    for changed in ({"max_batch_tokens": 48}, {}):
        teacher.process.signal(signal.SIGTERM)
        teacher.process.succeed()
        teacher.configure(engine=changed)
        teacher.start()
        if changed:
            gate.let_go()
            trainer.until(lambda: trainer.events("a teacher is left out"))
            assert not trainer.has_ended(within_s=1)
    trainer.succeed()
    (warning,) = trainer.events("a teacher is left out")
    said = r"it takes sequences of at most 48 tokens, and this job has one of (\d+)"
    assert (found := re.fullmatch(said, warning["reason"])) and 48 < int(found[1]) <= 96
    assert job.record() == undisturbed.plain.record()
