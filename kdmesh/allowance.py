"""How much of its machine this process may use: cores and memory, as limited by its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**60  # what version 1 says instead of a word


def num_cores() -> int:
    """Those it may run on, or as many as its container's share of time is worth, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    share = ControlGroups().cpu_share()
    return allowed if share is None else min(allowed, max(1, math.ceil(share)))


def available_bytes() -> int:
    """Memory that it can still have: what the machine has to give, or its container's limit leaves."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    of_machine = int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024
    left = ControlGroups().memory_left_bytes()
    return of_machine if left is None else min(of_machine, max(0, left))


@dataclass(frozen=True, slots=True)
class ControlGroups:
    """Those that hold this process, of both versions, as the kernel shows them; a container does not see all."""

    of_process: Path = Path("/proc/self/cgroup")
    mounted: Path = Path("/sys/fs/cgroup")

    def cpu_share(self) -> float | None:
        """The least of the limits of time, in cores; None where there is none.

        More threads than that wait for the next period together, with whatever locks they hold.
        """
        return min((share for group in self._groups("cpu") if (share := _cpu_share(group)) is not None), default=None)

    def memory_limit(self) -> int | None:
        """The least of the limits, in bytes; None where there is none."""
        return min((limit for limit, _ in self._memory()), default=None)

    def memory_left_bytes(self) -> int | None:
        """The least that a limit leaves, less than nothing perhaps; None where there is none."""
        return min((limit - used for limit, used in self._memory()), default=None)

    def _memory(self) -> Iterator[tuple[int, int]]:
        return (found for group in self._groups("memory") if (found := _limit_and_used(group)) is not None)

    def _groups(self, controller: str) -> Iterator[Path]:
        """Directories."""
        with suppress(OSError):
            for line in self.of_process.read_text(encoding="utf-8").splitlines():
                _, controllers, path = line.split(":", 2)
                if controllers and controller not in controllers.split(","):
                    continue
                top = self.mounted / controllers
                group = top / path.lstrip("/")
                yield from (group, *(parent for parent in group.parents if parent.is_relative_to(top)))


def _cpu_share(group: Path) -> float | None:
    with suppress(OSError, ValueError):  # not there, or "max"
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{what}_us").read_text(encoding="ascii") for what in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None  # -1: no limit
    return None


def _limit_and_used(group: Path) -> tuple[int, int] | None:
    """In bytes; of what is used, all but the pages of files, which the kernel gives up for others."""
    for limit, used, of_files in (
        ("memory.max", "memory.current", ("active_file", "inactive_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    ):
        with suppress(OSError, ValueError):  # not there, or "max"
            limit_bytes, used_bytes = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            file_bytes = sum(int(stat.get(name, 0)) for name in of_files)
            return None if limit_bytes >= _NO_LIMIT else (limit_bytes, used_bytes - file_bytes)
    return None
