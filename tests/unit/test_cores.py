"""Cores that a process may use, from control groups as the kernel shows them in a machine and in a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kdmesh import cores


def groups(root: Path, of_process: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "cgroup").write_text(of_process)
    return root / "cgroup", root / "mounted"


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
    assert cores.cpu_share(*groups(tmp_path, of_process, files)) == share


def test_without_control_groups_there_is_no_share(tmp_path: Path) -> None:
    assert cores.cpu_share(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("share", "expected"), [(None, 8), (0.2, 1), (2.5, 3), (4.0, 4), (64.0, 8)])
def test_a_share_of_a_core_is_worth_a_thread(
    share: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "cpu_share", lambda: share)
    assert cores.num_cores() == expected
