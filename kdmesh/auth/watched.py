"""Files that are read again when they change."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from kdmesh.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

Signature = tuple[tuple[int, ...] | None, ...]


_AGAIN_S = 1.0  # after a change that could not be read


class Unreadable(ConfigError):
    """A file cannot be read now, whatever it holds; it may be in a moment."""


class Watched(Generic[T]):
    """What some files say now. Safe to use from any thread.

    The files are looked at whenever somebody wants to know, which costs a `stat` each: a Secret whose symbolic link
    was swapped is seen at once. Files that changed to something that cannot be used leave what they said before;
    those that cannot be read are read again within a second of somebody wanting to know.

    Args:
        paths: the files.
        read: what they say; raises ConfigError when they cannot be used, Unreadable among them.
        on_failure: called once for every change that could not be used.
        clock: seconds that only grow.

    Raises, when made:
        ConfigError: the files cannot be used.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._on_failure = on_failure
        self._turn = threading.Lock()
        self._clock = clock
        self._seen = self._signature()
        self._unreadable: Signature | None = None  # what changed and could not be read, and when to try again
        self._again_s = 0.0
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
        if signature == self._seen or (signature == self._unreadable and self._clock() < self._again_s):
            return
        files = [str(path) for path in self._paths]
        try:
            self._value = self._read()
            log.info("files read again", extra={"files": files})
        except ConfigError as error:
            if signature != self._unreadable:
                reason = {"files": files, "reason": str(error)}
                log.error("changed files are of no use, what they said before holds", extra=reason)
                self._on_failure()
            if isinstance(error, Unreadable):
                self._unreadable, self._again_s = signature, self._clock() + _AGAIN_S
                return
        self._seen, self._unreadable = signature, None

    def _signature(self) -> Signature:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises Unreadable."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot read {path}: {error.strerror or error}") from None
