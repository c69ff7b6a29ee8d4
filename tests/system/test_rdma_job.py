"""A whole job whose rows come by RDMA's door, over NIXL's TCP transport."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest

from kdmesh.handles.rdma.agent import UNSAFE_VALUE, UNSAFE_VARIABLE
from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = [
    pytest.mark.rdma,
    pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="make test-rdma installs NIXL"),
]


def test_rows_by_rdma_change_no_figure_also_when_the_teacher_is_killed(
    materials: Materials,
    undisturbed: Undisturbed,
    processes: Processes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(UNSAFE_VARIABLE, UNSAFE_VALUE)
    monkeypatch.setenv("UCX_TLS", "tcp")
    teacher = Teacher(processes, tmp_path / "teacher", materials.teacher, server={"rdma": True})
    job = Job(processes, tmp_path / "rdma", materials.plain, teacher.address, teacher={"door": "rdma"})
    gate = job.gate(20)
    teacher.start()
    running = job.start()
    running.until(gate.is_reached)
    teacher.process.signal(signal.SIGKILL)
    gate.let_go()
    teacher.start()
    running.succeed()
    assert job.record() == undisturbed.plain.record()
    assert {step["door"] for step in job.steps()} == {"rdma"}
