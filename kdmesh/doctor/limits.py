"""How much a machine, or the container that this process is in, lets kdmesh have."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from kdmesh.allowance import ControlGroups, available_bytes
from kdmesh.doctor.finding import Finding, ok
from kdmesh.open_files import LEAST, most_open_files
from kdmesh.serving.words import size

_SHARED_MEMORY_BYTES = 2**30
_DESCRIPTORS = 4096
_CLOCK_ERROR = 5  # adjtimex(2): TIME_ERROR


def limits() -> Iterator[Finding]:
    """Cores, memory, shared memory, locked memory, open files, and the clock."""
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _locked_memory()
    yield _descriptors()
    yield _clock()


def _cores() -> Finding:
    """Informs only: GPUs need few."""
    share = ControlGroups().cpu_share()
    within = "" if share is None else f", and this container may have the time of {share:g}"
    return ok("cores", f"{len(os.sched_getaffinity(0))} are allowed{within}")


def _memory() -> Finding:
    """Informs only: how much is enough depends on the models."""
    limit = ControlGroups().memory_limit()
    within = "" if limit is None else f" of the {size(limit)} that this container may have"
    return ok("memory", f"{size(available_bytes())} are available{within}; slabs are charged to their server")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    total = shutil.disk_usage(path).total if path.is_dir() else 0
    found = f"/dev/shm holds {size(total)}"
    if total >= _SHARED_MEMORY_BYTES:
        return ok("/dev/shm", found)
    return Finding(
        name="/dev/shm",
        verdict="worse",
        found=found,
        cost="NCCL and SGLang keep buffers there, and fail when it is full; kdmesh's slabs do not lie there",
        cure="docker run --shm-size 8g, or a volume emptyDir of medium Memory at /dev/shm",
    )


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "without a limit", part="rdma")
    return Finding(
        name="locked memory",
        verdict="worse",
        found=f"at most {size(soft)}",
        cost="a slab that is larger cannot be registered for RDMA: rows from other nodes come as a stream",
        cure="ulimit -l unlimited; for containers, LimitMEMLOCK=infinity of the container runtime",
        part="rdma",
    )


def _descriptors() -> Finding:
    most = most_open_files()  # which every service takes
    if most >= _DESCRIPTORS:
        return ok("open files", f"at most {most}")
    return Finding(
        name="open files",
        verdict="missing" if most < LEAST else "worse",
        found=f"at most {most}",
        cost=f"every slot and every client of a server takes some: many clients are turned away; below {LEAST} no "
        "service starts",
        cure=f"ulimit -n {_DESCRIPTORS}, LimitNOFILE in systemd, or --ulimit nofile of a container",
    )


def _clock() -> Finding:
    """Whether the kernel takes its clock for right."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))  # a zeroed struct timex: reads
    if state == -1:
        return Finding(name="clock", verdict="unknown", found=os.strerror(ctypes.get_errno()))
    if state != _CLOCK_ERROR:
        return ok("clock", "kept by a time server")
    return Finding(
        name="clock",
        verdict="worse",
        found="nobody keeps it right",
        cost="web tokens and certificates are judged by it: some may be refused, or taken too long",
        cure="chrony, or another client of NTP, on the machine",
    )
