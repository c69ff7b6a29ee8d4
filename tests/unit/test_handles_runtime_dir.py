from __future__ import annotations

import contextlib
import fcntl
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from kdmesh.errors import ConfigError
from kdmesh.handles.slab import named_memory
from kdmesh.handles.slab.runtime_dir import runtime_dir

_HOLD = """
import sys
from pathlib import Path
from kdmesh.handles.slab import named_memory
from kdmesh.handles.slab.runtime_dir import runtime_dir
with runtime_dir(None) as directory:
    named_memory.note(directory.path, map(Path, sys.argv[1:]))
    print(directory.path, flush=True)
    input()
"""
_MAP = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
print(flush=True)
input()
"""


@pytest.fixture(autouse=True)
def _private_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def _run(code: str, *arguments: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that waits for a line, and the one that it wrote."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def _start(*noted: Path) -> tuple[subprocess.Popen[str], Path]:
    process, directory = _run(_HOLD, *noted)
    return process, Path(directory)


@contextlib.contextmanager
def _named(count: int) -> Iterator[list[Path]]:
    """Files of named memory; removed on exit."""
    files = [named_memory.DIRECTORY / f"kdmesh-test-{secrets.token_hex(8)}" for _ in range(count)]
    try:
        for file in files:
            file.write_bytes(b"12345678")
        yield files
    finally:
        for file in files:
            file.unlink(missing_ok=True)


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


def test_named_memory_of_a_killed_server_goes_with_its_directory_and_nobody_elses(tmp_path: Path) -> None:
    with _named(4) as (left, taken, of_the_living, unknown):
        (killed, _), (living, used) = _start(left, taken), _start(of_the_living)
        with killed, living:
            killed.kill()
            killed.wait()
            with _named(1) as (other,):
                other.replace(taken)  # another program's, under a name that was free again
                with runtime_dir(None) as directory:
                    assert set(tmp_path.iterdir()) == {used, directory.path}
            assert [file.exists() for file in (left, taken, of_the_living, unknown)] == [False, True, True, True]
            living.communicate("\n")


def test_named_memory_that_a_process_of_a_killed_server_still_uses_goes_at_a_later_start(tmp_path: Path) -> None:
    with _named(1) as (file,):
        (killed, left), (user, _) = _start(file), _run(_MAP, file)
        with killed, user:
            killed.kill()
            killed.wait()
            with runtime_dir(None):
                assert file.exists()
                assert left.is_dir()
            user.communicate("\n")
            with runtime_dir(None):
                assert not file.exists()
                assert not left.exists()


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


def test_a_configured_directory_that_was_missing_goes_with_its_server(tmp_path: Path) -> None:
    with runtime_dir(tmp_path / "run" / "kdmesh") as directory:
        assert directory.path.is_dir()
    assert not directory.path.exists()


def test_a_server_leaves_what_another_has_in_the_configured_directory(tmp_path: Path) -> None:
    shared = tmp_path / "kdmesh"
    with runtime_dir(shared), runtime_dir(shared) as other:
        (other.path / "teacher-2.sock").touch()
    assert (shared / "teacher-2.sock").exists()


def test_a_configured_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make the runtime directory .*/file/kdmesh"):
        runtime_dir(tmp_path / "file" / "kdmesh").__enter__()


def test_two_servers_may_make_the_configured_directory_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def make_when_another_has(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        make(path, mode, parents, exist_ok=True)
        make(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", make_when_another_has)
    with runtime_dir(tmp_path / "kdmesh") as directory:
        assert directory.path.is_dir()
    assert directory.path.is_dir()  # it is the other's
