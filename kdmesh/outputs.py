"""Whether what a command will find can be written, asked before it begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kdmesh.errors import ConfigError


def make_writable(path: Path) -> None:
    """Make the directory that `path` lies in, and try a file there; one at `path` is untouched.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from None
