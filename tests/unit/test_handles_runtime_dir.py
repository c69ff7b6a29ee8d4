from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

from kdmesh.handles.runtime_dir import runtime_dir

_HOLD = """
from kdmesh.handles.runtime_dir import runtime_dir
with runtime_dir(None) as directory:
    print(directory.path, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def _private_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def _start() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_private_directory_goes_with_its_server(tmp_path: Path) -> None:
    with runtime_dir(None) as directory:
        assert directory.path.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_next_server_removes_what_a_killed_one_left_but_not_what_a_living_one_uses(tmp_path: Path) -> None:
    (killed, left), (living, used) = _start(), _start()
    with killed, living:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.is_dir()
        with runtime_dir(None) as directory:
            assert set(tmp_path.iterdir()) == {used, directory.path}
        living.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_starts_is_not_taken_for_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def lock_when_another_has_started(file: IO[str], operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        with runtime_dir(None):
            pass
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_when_another_has_started)
    with runtime_dir(None) as directory:
        assert list(tmp_path.iterdir()) == [directory.path]
    assert list(tmp_path.iterdir()) == []


def test_a_configured_directory_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    with runtime_dir(tmp_path) as directory:
        assert list(directory.path.iterdir()) == []
    assert tmp_path.is_dir()
