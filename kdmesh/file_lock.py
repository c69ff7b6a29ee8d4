"""A file, or a run's directory, that one process has at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

from kdmesh.errors import ConfigError


def lock(file: IO[Any] | FileIO, *, refusal: str) -> None:
    """Have the file until it is closed; a process that dies gives it up.

    Raises:
        ConfigError: another process has it, which `refusal` says; or it lies on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(refusal) from None
    except OSError as error:
        raise ConfigError(f"cannot lock {file.name}: {error.strerror}") from None


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keep every other run out of `directory`, which is made if need be; a run that dies gives it up.

    Raises:
        ConfigError: it cannot be made or locked, or another run has it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"output {directory} cannot be written: {error.strerror}") from error
    with file:
        lock(file, refusal=f"another run is writing to {directory}; give this one another `output`")
        yield
