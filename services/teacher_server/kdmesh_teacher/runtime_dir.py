"""The directory that the broker's socket lies in."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RuntimeDir:
    """A directory that exists."""

    path: Path
    is_ours: bool  # made by this process

    def remove(self) -> None:
        """Remove it with all that lies in it, if this process made it."""
        if self.is_ours:
            shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def runtime_dir(configured: Path | None) -> Iterator[RuntimeDir]:
    """The configured directory, made if it is missing, or a private one; removed on exit if it was made here.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        directory = _make(configured)
    except OSError as error:
        raise ConfigError(f"cannot make server.runtime_dir {configured or tempfile.gettempdir()}: {error}") from None
    try:
        yield directory
    finally:
        directory.remove()


def _make(configured: Path | None) -> RuntimeDir:
    if configured is None:
        return RuntimeDir(Path(tempfile.mkdtemp(prefix="kdmesh-teacher-")), is_ours=True)
    if configured.is_dir():
        return RuntimeDir(configured, is_ours=False)
    configured.mkdir(mode=0o700, parents=True)
    return RuntimeDir(configured, is_ours=True)
