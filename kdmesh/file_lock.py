"""A file that one process has at a time."""

from __future__ import annotations

import fcntl
from io import FileIO
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
        raise ConfigError(f"cannot lock {file.name}: {error}") from None
