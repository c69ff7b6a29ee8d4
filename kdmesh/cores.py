"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_OF_PROCESS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Those it may run on, or as many as its container's share of time is worth, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    share = cpu_share()
    return allowed if share is None else min(allowed, max(1, math.ceil(share)))


def cpu_share(of_process: Path = _OF_PROCESS, mounted: Path = _MOUNTED) -> float | None:
    """The least of the limits of this process's control groups, in cores; None where there is none.

    More threads than that wait for the next period together, with whatever locks they hold.
    """
    return min((share for group in _groups(of_process, mounted) if (share := _share(group)) is not None), default=None)


def _groups(of_process: Path, mounted: Path) -> Iterator[Path]:
    """Directories of the control groups that hold this process, of both versions; some are hidden in a container."""
    with suppress(OSError):
        for line in of_process.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = mounted / controllers
            group = top / path.lstrip("/")
            yield from (group, *(parent for parent in group.parents if parent.is_relative_to(top)))


def _share(group: Path) -> float | None:
    with suppress(OSError, ValueError):  # not there, or "max"
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{what}_us").read_text(encoding="ascii") for what in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None  # -1: no limit
    return None
