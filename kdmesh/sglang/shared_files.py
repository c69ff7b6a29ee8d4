"""Named shared memory that SGLang's processes make, and that nobody removes when they are killed, as it ends them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Set
from pathlib import Path

_DIRECTORY = "/dev/shm"
# SGLang's own, and those of Python's multiprocessing, whose tracker of them SGLang kills too (0.5.23). What else they
# have mapped may be somebody else's.
_THEIRS = ("sglang_loads_", "sgl_shm_", "sem.mp-", "psm_")


def mapped_by(pids: Iterable[int]) -> frozenset[Path]:
    """Those that these processes have mapped; of a dead one none are known any more."""
    inodes = set[int]()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
            inodes |= {int(line.split()[4]) for line in lines if f" {_DIRECTORY}/" in line}
    # By inode, for a semaphore is mapped under another name than it then gets.
    return frozenset(Path(file.path) for file in os.scandir(_DIRECTORY) if _is_theirs(file, inodes))


def _is_theirs(file: os.DirEntry[str], inodes: Set[int]) -> bool:
    return file.name.startswith(_THEIRS) and file.inode() in inodes


def remove(files: Iterable[Path]) -> None:
    """Remove those that are still there; whoever made them is dead."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()
