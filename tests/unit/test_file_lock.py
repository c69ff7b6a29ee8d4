"""What one process may write at a time is locked, or refused."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from kdmesh.answering.kept_answers import kept_answers
from kdmesh.errors import ConfigError
from kdmesh.file_lock import claimed
from kdmesh_teacher.cache.directory import opened

LOCKED: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "answers on their way": kept_answers,
    "rows kept in files": lambda path: opened(path, 0),
    "a run's output": claimed,
}


@pytest.fixture(params=LOCKED)
def locked(request: pytest.FixtureRequest) -> Callable[[Path], AbstractContextManager[Any]]:
    return LOCKED[request.param]


def test_a_second_process_is_refused(locked: Callable[[Path], AbstractContextManager[Any]], tmp_path: Path) -> None:
    with locked(tmp_path / "here"), pytest.raises(ConfigError, match="another"), locked(tmp_path / "here"):
        pass
    with locked(tmp_path / "here"):
        pass


def test_a_file_system_without_locks_is_refused(
    locked: Callable[[Path], AbstractContextManager[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    with pytest.raises(ConfigError, match=r"cannot lock .*here.*No locks available"), locked(tmp_path / "here"):
        pass
