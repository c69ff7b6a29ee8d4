"""What a process may use, from control groups as the kernel shows them in a machine and in a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kdmesh import allowance
from kdmesh.allowance import ControlGroups


def groups(root: Path, of_process: str, files: dict[str, str]) -> ControlGroups:
    for name, text in files.items():
        path = root / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "cgroup").write_text(of_process)
    return ControlGroups(root / "cgroup", root / "mounted")


V1 = "5:cpuset:/a\n4:cpu,cpuacct:/kubepods/pod1/c1\n1:name=systemd:/a\n0::/a\n"


@pytest.mark.parametrize(
    ("of_process", "files", "share"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),  # a container with a view of its own
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),  # the root of a machine
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "300000 100000\n"}, 0.5),
        ("0::/a/b\n", {"c/cpu.max": "50000 100000\n"}, None),  # another's
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 1.5),
        (
            V1,
            {
                "cpu,cpuacct/kubepods/pod1/c1/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/kubepods/pod1/c1/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/kubepods/pod1/cpu.cfs_quota_us": "400000\n",
                "cpu,cpuacct/kubepods/pod1/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_the_share_is_the_least_of_the_groups_that_hold_the_process(
    tmp_path: Path, of_process: str, files: dict[str, str], share: float | None
) -> None:
    assert groups(tmp_path, of_process, files).cpu_share() == share


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    none = ControlGroups(tmp_path / "none", tmp_path)
    assert (none.cpu_share(), none.memory_limit(), none.memory_left_bytes()) == (None, None, None)


@pytest.mark.parametrize(("share", "expected"), [(None, 8), (0.2, 1), (2.5, 3), (4.0, 4), (64.0, 8)])
def test_a_share_of_a_core_is_worth_a_thread(
    share: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(ControlGroups, "cpu_share", lambda self: share)
    assert allowance.num_cores() == expected


FILES = "anon 5\nfile 900\nactive_file 100\ninactive_file 200\n"
V1_FILES = "cache 900\ninactive_file 1\ntotal_active_file 100\ntotal_inactive_file 200\n"


@pytest.mark.parametrize(
    ("of_process", "files", "limit", "left"),
    [
        ("0::/\n", {"memory.max": "4000\n", "memory.current": "1000\n", "memory.stat": FILES}, 4000, 3300),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "1000\n", "memory.stat": FILES}, None, None),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "4000\n",
                "a/b/memory.current": "1000\n",
                "a/b/memory.stat": FILES,
                "a/memory.max": "5000\n",
                "a/memory.current": "4900\n",
                "a/memory.stat": FILES,
            },
            4000,
            400,
        ),
        (
            "4:memory:/docker/c1\n",
            {
                "memory/memory.limit_in_bytes": "4000\n",
                "memory/memory.usage_in_bytes": "1000\n",
                "memory/memory.stat": V1_FILES,
            },
            4000,
            3300,
        ),
        (
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "1000\n",
                "memory/memory.stat": V1_FILES,
            },
            None,
            None,
        ),
    ],
)
def test_memory_is_what_the_limits_leave_beside_pages_of_files(
    tmp_path: Path, of_process: str, files: dict[str, str], limit: int | None, left: int | None
) -> None:
    found = groups(tmp_path, of_process, files)
    assert (found.memory_limit(), found.memory_left_bytes()) == (limit, left)


def test_a_container_has_no_more_memory_than_its_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    for left, expected in ((5000, 5000), (-5, 0)):
        monkeypatch.setattr(ControlGroups, "memory_left_bytes", lambda self, left=left: left)
        assert allowance.available_bytes() == expected
