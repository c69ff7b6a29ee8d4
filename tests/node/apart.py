"""Namespaces of a node of the tests' own: what it would change on the machine lies in them, and ends with them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

ADDRESS = "10.200.0.1"  # of the node

# Programs of a node write there, whatever they are told.
_EMPTY = ("/run", "/var/lib", "/var/log")
# A kubelet writes these settings of the kernel, which has them once for all namespaces, unless it finds them so.
_WANTED = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
_GROUPS = Path("/sys/fs/cgroup")


def obstacle() -> str:
    """Why there can be no node in this process; empty when there can."""
    if os.geteuid() != 0:
        return "needs root"
    if {name for _, name in socket.if_nameindex()} != {"lo"}:
        return "needs the namespaces that `make test-node` makes"
    if not (_GROUPS / "memory").is_dir():
        return "needs control groups of version 1"
    return ""


def raise_loopback() -> None:
    """Which a new namespace has down."""
    _run("ip", "link", "set", "lo", "up")


def furnish(directory: Path) -> None:
    """Make these namespaces a machine that a node may have for itself. `directory` is for files of it."""
    _run("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
    for place in _EMPTY:
        _run("mount", "-t", "tmpfs", "none", place)
    for number, (setting, value) in enumerate(_WANTED.items()):
        _cover(Path("/proc/sys") / setting, value, directory / f"setting-{number}")
    _cover(Path("/etc/resolv.conf"), f"nameserver {ADDRESS}", directory / "resolv.conf")


def make_control_groups(name: str) -> None:
    """A group of this name of every kind, for all pods."""
    remove_control_groups(name)
    for kind in _kinds():
        (kind / name).mkdir()  # also of version 2, which whoever makes one of version 1 makes as well
        if kind.name == "cpuset":  # nothing may enter one that has none
            for setting in ("cpuset.cpus", "cpuset.mems"):
                (kind / name / setting).write_text((kind / setting).read_text())


def remove_control_groups(name: str) -> None:
    """With all within; nobody may be in them any more."""
    for kind in _kinds():
        for found, _, _ in os.walk(kind / name, topdown=False):
            os.rmdir(found)


def _kinds() -> list[Path]:
    return [kind for kind in _GROUPS.iterdir() if kind.is_dir() and not kind.is_symlink()]


def _cover(path: Path, text: str, by: Path) -> None:
    by.write_text(f"{text}\n", encoding="utf-8")
    _run("mount", "--bind", str(by), str(path))


def _run(*command: str) -> None:
    program = shutil.which(command[0])
    assert program is not None, f"there is no {command[0]}"
    subprocess.run([program, *command[1:]], check=True)
