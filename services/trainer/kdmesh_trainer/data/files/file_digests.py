"""What files hold, as digests that are kept: a file is read for its digest only when it is new or was changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from kdmesh.weights.digests import Running
from kdmesh_trainer.data.files.piece import reading

_READ_BYTES = 4 * 2**20
_WHOLE = re.compile(rb"[0-9a-f]{32}")


class FileDigests:
    """Digests of files by their content, kept in a directory by path, size, times and inode."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def known(self, path: Path) -> str | None:
        """That of a file; None: it must be read for it. Raises DataError when the file cannot be read."""
        kept = self._directory / _state(path)
        told = kept.read_bytes() if kept.is_file() else b""
        # One that a power cut has left empty is none, nor is one that is damaged.
        return told.decode() if _WHOLE.fullmatch(told) else None

    def read(self, path: Path) -> str:
        """That of a file, which is read and remembered. One process at a time.

        Raises:
            DataError: the file cannot be read.
            OSError: its digest cannot be kept.
        """
        known = self.known(path)
        if known is not None:
            return known
        state = _state(path)
        found = _digest(path)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self._directory / f"{state}.part"
        part.write_text(found, encoding="ascii")
        os.replace(part, self._directory / state)
        return found


def _digest(path: Path) -> str:
    digest = Running()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _state(path: Path) -> str:
    """A name of the file as it is: another as soon as somebody writes to it, or puts another in its place."""
    with reading(path):
        stat = path.stat()
    told = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()
