"""Named shared memory that SGLang's processes make, and that nobody removes when they are killed, as it ends them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from kdmesh.handles.slab import named_memory

# SGLang's own, and those of Python's multiprocessing, whose tracker of them SGLang kills too (0.5.23). What else they
# have mapped may be somebody else's.
_THEIRS = ("sglang_loads_", "sgl_shm_", "sem.mp-", "psm_")


def mapped_by(pids: Iterable[int]) -> frozenset[Path]:
    """Those that these processes have mapped; of a dead one none are known any more."""
    # By inode, for a semaphore is mapped under another name than it then gets.
    inodes = named_memory.mapped_inodes(pids)
    files = [file for file in os.scandir(named_memory.DIRECTORY) if file.name.startswith(_THEIRS)]
    return frozenset(Path(file.path) for file in files if file.inode() in inodes)


def remove(files: Iterable[Path]) -> None:
    """Remove those that are still there; whoever made them is dead."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()
