"""The only teacher dies in the middle of a step, and comes back or does not; what it leaves on the machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Process, Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

_MIB = 2**20
_SLAB_BYTES = 128 * _MIB
# What a client may have mapped of the killed server's slab, until it notices.
_TOLERANCE_BYTES = _SLAB_BYTES // 4
_HASTY_S = 4


def _shared_memory(pid: int) -> dict[int, int]:
    """The bytes of each anonymous file in memory that a process has open, by inode."""
    found: dict[int, int] = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(descriptor).startswith("/memfd:"):
                status = descriptor.stat()
                found[status.st_ino] = status.st_size
    return found


def _bytes_in_use(memory: dict[int, int]) -> int:
    """Of these files, those that any process of the machine has open or mapped: nobody else keeps them alive."""
    used: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
            used |= _shared_memory(int(process.name)).keys()
            lines = (process / "maps").read_text().splitlines()
            used |= {int(line.split()[4]) for line in lines if "/memfd:" in line}
    return sum(size for inode, size in memory.items() if inode in used)


def _named_memory(*pids: int) -> set[str]:
    """Files of /dev/shm that these processes have mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Two jobs with one teacher, which is killed while both hold its rows. One waits for it, the other not so long."""

    teacher: Teacher  # the second server at its address; still serves
    patient: Job
    hasty: Job
    hasty_trainer: Process
    hasty_took_s: float  # from the kill to its end
    hasty_kept: int  # steps that it had done then
    hasty_again: Process
    slab: dict[int, int]  # of the first server
    named_memory: set[str]  # of all three while it serves
    left_bytes: int  # of the slab, before there is a second server
    dead_socket_ns: int  # when the first server made it


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("restart")
    slab = {"slots": 16, "slot_mib": _SLAB_BYTES / _MIB / 16}
    teacher = Teacher(processes, root / "teacher", materials.teacher, slab=slab)
    patient = Job(processes, root / "patient", materials.plain, teacher.address)
    hasty = Job(processes, root / "hasty", materials.plain, teacher.address, teacher={"deadline_s": _HASTY_S})
    gates = [job.gate(20) for job in (patient, hasty)]
    teacher.start()
    patient_trainer = patient.start()
    teacher.wait_ready()  # for which the hasty one would not wait
    hasty_trainer = hasty.start()
    for trainer, gate in zip((patient_trainer, hasty_trainer), gates, strict=True):
        trainer.until(gate.is_reached)
    assert min(*teacher.slots("patient"), *teacher.slots("hasty")) > 0
    slab_of_first, dead_socket_ns = _shared_memory(teacher.process.pid), _socket(teacher).stat().st_ctime_ns
    named_memory = _named_memory(teacher.process.pid, patient_trainer.pid, hasty_trainer.pid)
    teacher.process.signal(signal.SIGKILL)
    killed_s = time.monotonic()
    for gate in gates:
        gate.let_go()
    hasty_trainer.exit_code()
    hasty_took_s = time.monotonic() - killed_s
    hasty_kept = len(hasty.steps())
    left_bytes = _bytes_in_use(slab_of_first)
    teacher.start()
    again = hasty.start("teacher.deadline_s=100")
    teacher.wait_ready()
    patient_trainer.succeed()
    again.succeed()
    return Story(
        teacher=teacher,
        patient=patient,
        hasty=hasty,
        hasty_trainer=hasty_trainer,
        hasty_took_s=hasty_took_s,
        hasty_kept=hasty_kept,
        hasty_again=again,
        slab=slab_of_first,
        named_memory=named_memory,
        left_bytes=left_bytes,
        dead_socket_ns=dead_socket_ns,
    )


def _socket(teacher: Teacher) -> Path:
    (socket,) = teacher.runtime_dir.iterdir()
    return socket


def test_job_waits_for_its_teacher_and_learns_exactly_the_same(story: Story, undisturbed: Undisturbed) -> None:
    assert story.patient.record() == undisturbed.plain.record()
    assert max(step["teacher_wait_s"] for step in story.patient.steps()) > 1


def test_job_that_waits_no_longer_says_so(story: Story) -> None:
    assert story.hasty_trainer.exit_code() == 3
    address = re.escape(story.teacher.address)
    (sentence,) = story.hasty_trainer.words()
    assert re.match(
        rf"Error: (no teacher is ready|{address} has not answered) within {_HASTY_S} s \({address}: ", sentence
    )
    assert story.hasty_took_s < _HASTY_S + 5


def test_job_that_gave_up_continues_with_the_next_teacher(story: Story, undisturbed: Undisturbed) -> None:
    assert story.hasty.record() == undisturbed.plain.record()
    (event,) = story.hasty_again.events("continuing from a checkpoint")
    assert event["step"] == story.hasty_kept > 0


def test_killed_teacher_leaves_no_memory(story: Story) -> None:
    assert sum(story.slab.values()) >= _SLAB_BYTES
    assert story.left_bytes < _TOLERANCE_BYTES


def test_next_server_replaces_the_socket_of_the_killed_one(story: Story) -> None:
    assert _socket(story.teacher).stat().st_ctime_ns > story.dead_socket_ns


def test_in_the_end_nothing_is_left(story: Story) -> None:
    second = _shared_memory(story.teacher.process.pid)
    assert _bytes_in_use(second) >= _SLAB_BYTES
    story.teacher.process.signal(signal.SIGTERM)
    story.teacher.process.succeed()
    assert not list(story.teacher.runtime_dir.iterdir())
    assert _bytes_in_use(story.slab | second) == 0
    assert not [path for path in story.named_memory if Path(path).exists()]
    directory = str(story.patient.output.parents[1])
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if directory in command]
