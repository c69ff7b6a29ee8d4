"""Named shared memory of a server's processes, noted so that it goes even if all of them are killed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

DIRECTORY = Path("/dev/shm")
NOTE = "named-memory.json"
"""In the runtime directory of a server."""


def mapped_inodes(pids: Iterable[int]) -> frozenset[int]:
    """Of the files of `DIRECTORY` that these processes have mapped, under whatever name; none of a dead one.

    Processes of other users are passed over.
    """
    device = DIRECTORY.stat().st_dev
    where = b"%02x:%02x" % (os.major(device), os.minor(device))
    found = set[int]()
    for pid in pids:
        with contextlib.suppress(OSError):
            mappings = [line.split() for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines()]
            found |= {int(inode) for _, _, _, at, inode, *_ in mappings if at == where}
    return frozenset(found)


def note(directory: Path, files: Iterable[Path]) -> None:
    """Write down in a server's runtime directory that these files of `DIRECTORY` are its own."""
    inodes = {file.name: file.stat().st_ino for file in files}
    part = directory / f"{NOTE}.part"
    part.write_text(json.dumps(inodes), encoding="utf-8")
    part.replace(directory / NOTE)


def remove_noted(directory: Path) -> bool:
    """Remove the files that a dead server has noted; False when a living process still has one of them mapped."""
    try:
        inodes: dict[str, int] = json.loads((directory / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    # By name and inode, for somebody may have taken the name since.
    left = {file.inode(): Path(file) for file in os.scandir(DIRECTORY) if inodes.get(file.name) == file.inode()}
    used = mapped_inodes(int(name) for name in os.listdir("/proc") if name.isdecimal()) if left else frozenset()
    for inode, path in left.items():
        if inode not in used:
            path.unlink(missing_ok=True)
    return used.isdisjoint(left)
