"""The directory that a broker's socket lies in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdmesh.errors import ConfigError
from kdmesh.handles.slab import named_memory

_PREFIX = "kdmesh-broker-"
_UNLOCKED_PREFIX = "kdmesh-new-broker-"  # nobody takes one for abandoned
_LOCK = "lock"  # held for as long as the server lives, however it dies


@dataclass(frozen=True, slots=True)
class RuntimeDir:
    """A directory that exists."""

    path: Path
    is_ours: bool  # made by this process
    is_private: bool  # nobody else puts anything there

    def remove(self) -> None:
        """Remove it, if this process made it; not with what other servers have in it."""
        if self.is_private:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.is_ours:
            with contextlib.suppress(OSError):
                self.path.rmdir()


@contextlib.contextmanager
def runtime_dir(configured: Path | None) -> Iterator[RuntimeDir]:
    """The configured directory, made if it is missing, or a private one; removed on exit if it was made here.

    A configured one is removed only when it is empty by then: other servers may have their sockets in it.

    Private directories of this user's servers that were killed are removed too, with the named memory noted there.

    Raises:
        ConfigError: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            if configured is None:
                directory = _private(stack)
                _remove_abandoned(directory.path.parent)
            else:
                directory = _make(configured)
                stack.callback(directory.remove)
        except OSError as error:
            place = configured or tempfile.gettempdir()
            raise ConfigError(f"cannot make the runtime directory {place}: {error}") from None
        yield directory


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process. Raises BlockingIOError when another one holds it."""
    with path.open("r") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        # BlockingIOError: its server lives. Others: it ends at this moment, or it is not ours to open.
        with contextlib.suppress(OSError):
            if lock.stat().st_uid == os.getuid():
                with _locked(lock):
                    if named_memory.remove_noted(lock.parent):
                        shutil.rmtree(lock.parent)


def _private(stack: contextlib.ExitStack) -> RuntimeDir:
    """A new one, removed when `stack` ends. It gets its name when it is locked: before that it would look abandoned."""
    unlocked = Path(tempfile.mkdtemp(prefix=_UNLOCKED_PREFIX))
    directory = RuntimeDir(
        unlocked.with_name(unlocked.name.replace(_UNLOCKED_PREFIX, _PREFIX)), is_ours=True, is_private=True
    )
    stack.callback(shutil.rmtree, unlocked, ignore_errors=True)
    stack.callback(directory.remove)
    (unlocked / _LOCK).touch()
    stack.enter_context(_locked(unlocked / _LOCK))
    unlocked.rename(directory.path)
    return directory


def _make(configured: Path) -> RuntimeDir:
    try:
        configured.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        if not configured.is_dir():
            raise
        return RuntimeDir(configured, is_ours=False, is_private=False)
    return RuntimeDir(configured, is_ours=True, is_private=False)
