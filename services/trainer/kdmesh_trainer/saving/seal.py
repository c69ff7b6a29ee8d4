"""Digests of a checkpoint's files, so that what is loaded is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from kdmesh.weights import digests
from kdmesh_trainer.saved_config import read_json, unreadable
from kdmesh_trainer.saving.files import write_synced

SEAL = "digests.json"

Digests = Mapping[str, str]
"""Of files by name, in hexadecimal."""


def digests_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Read these files and say what is in them. Raises OSError."""
    return {name: _digest(directory / name) for name in names}


def write_seal(directory: Path, by_rank: Sequence[Digests]) -> None:
    """Write down what each rank wrote, on disk when this returns. Raises OSError."""
    write_synced(directory / SEAL, json.dumps(by_rank, indent=1))


def read_seal(checkpoint: Path) -> list[Digests]:
    """What each rank wrote. Raises CheckpointError."""
    try:
        return [dict(part) for part in read_json(checkpoint, SEAL)]
    except FileNotFoundError:
        raise unreadable(checkpoint, f"there is no {SEAL} in it") from None
    except (ValueError, TypeError):
        raise unreadable(checkpoint, f"{SEAL} does not say what it is to say") from None


def damages(directory: Path, expected: Digests) -> Iterator[str]:
    """A sentence for each file that is not what was written."""
    for name, digest in expected.items():
        try:
            if _digest(directory / name) != digest:
                yield f"{name} is damaged: it is not what {SEAL} says was written"
        except OSError as error:
            yield f"{name}: {error.strerror}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, digests.Running).hexdigest()
