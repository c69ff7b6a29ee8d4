"""The output directory: files that survive a power cut."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdmesh.errors import CheckpointError

log = logging.getLogger(__name__)


def write_synced(path: Path, text: str) -> None:
    """Write a text file, on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Put a written file's content, or a directory's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: Mapping[str, object]) -> None:
    """Add one JSON object to a file of a run, which is made if need be.

    Raises:
        CheckpointError: it cannot be written.
    """
    with written_beside_checkpoints(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def keep_lines(path: Path, stays: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop the JSON lines that do not stay, and a last one that was never finished; all or nothing.

    Those that are damaged are dropped with a warning.

    Args:
        stays: may raise KeyError or TypeError for a line that is not as it was written.

    Returns:
        The others.

    Raises:
        CheckpointError: it cannot be read, or what is left cannot be written.
    """
    kept, texts, damaged = [], [], 0
    with written_beside_checkpoints(path):
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")  # not splitlines: texts may hold U+2028 as it is
        for number, text in enumerate(lines, start=1):
            try:
                is_kept = stays(line := json.loads(text))
            except (ValueError, KeyError, TypeError):  # no JSON, or not what was written
                damaged += number < len(lines)  # the last one, mostly of no bytes, was never finished
                continue
            if is_kept:
                kept.append(line)
                texts.append(text + b"\n")
        part = path.with_suffix(".part")
        part.write_bytes(b"".join(texts))
        os.replace(part, path)
    if damaged:
        log.warning("damaged lines of a record are dropped", extra={"path": str(path), "lines": damaged})
    return kept


@contextmanager
def written_beside_checkpoints(path: Path) -> Iterator[None]:
    """Say of a record that it cannot be written: a CheckpointError with its name and why."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; checkpoints are untouched") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a directory to make; complete when the context ends, it takes the place of `path`, on disk.

    When the context fails, an older one at `path` is untouched, and nothing else is left.
    """
    writing, replaced = _beside(path)
    settle(path)
    try:
        yield writing
        for written in writing.rglob("*"):
            # safetensors 0.8.0 lets nobody else read what it writes, and a server may be another user.
            written.chmod(written.stat().st_mode | writing.stat().st_mode & 0o444)
            sync(written)
        sync(writing)
        if path.exists():
            path.rename(replaced)
        writing.rename(path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def settle(path: Path) -> None:
    """Finish what `replacing` had begun at `path` when it was killed, if all of it was there, or else undo it."""
    writing, replaced = _beside(path)
    if replaced.exists() and not path.exists():  # killed between two names, when the new one was complete
        (writing if writing.exists() else replaced).rename(path)
    for left in (writing, replaced):
        shutil.rmtree(left, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a directory is made, and where the one that it replaces goes."""
    return path.with_name(f"{path.name}.writing"), path.with_name(f"{path.name}.replaced")
