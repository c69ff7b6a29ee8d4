"""Files that are read again when they change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from kdmesh.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

Signature = tuple[tuple[int, ...] | None, ...]


class Watched(Generic[T]):
    """What some files say now. Safe to use from any thread.

    The files are looked at whenever somebody wants to know, which costs a `stat` each: a Secret whose symbolic link
    was swapped is seen at once. Files that changed to something that cannot be used leave what they said before.

    Args:
        paths: the files.
        read: what they say; raises ConfigError when they cannot be used.
        on_failure: called once for every change that could not be used.

    Raises, when made:
        ConfigError: the files cannot be used.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], *, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._on_failure = on_failure
        self._turn = threading.Lock()
        self._seen = self._signature()
        self._value = read()

    def current(self) -> T:
        """What they say now, or last said."""
        if self._signature() != self._seen:
            with self._turn:
                self._look_again()
        return self._value

    def _look_again(self) -> None:
        # First the signature: what changes while it is read is read once more.
        signature = self._signature()
        if signature == self._seen:
            return
        files = [str(path) for path in self._paths]
        try:
            self._value = self._read()
            log.info("files read again", extra={"files": files})
        except ConfigError as error:
            log.error(
                "changed files are of no use, what they said before holds", extra={"files": files, "reason": str(error)}
            )
            self._on_failure()
        self._seen = signature

    def _signature(self) -> Signature:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
