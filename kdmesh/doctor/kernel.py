"""What kdmesh needs of the kernel, tried out rather than read from a version."""

from __future__ import annotations

import mmap
import os
import platform
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from kdmesh.doctor.finding import Finding, ok
from kdmesh.errors import EngineFailure
from kdmesh.handles.slab.memory import create_segment, map_readonly
from kdmesh.unix_path import unix_address

_SOCKET = "doctor.sock"
_NO_SERVER = (
    "no teacher or rollout server can start here, and no trainer on this node can use one through shared memory"
)


def kernel(runtime_dir: Path | None) -> Iterator[Finding]:
    """Memory that is shared and sealed, descriptors that are passed on, processes whose end is noticed.

    Args:
        runtime_dir: where servers put their socket; None: where they do so by themselves.
    """
    release = platform.release()
    yield _tried(
        "sealed memory",
        _share,
        well=f"Linux {release} seals memfds against later writing",
        cost=_NO_SERVER,
        cure="a kernel from 5.1 on, and a container runtime that allows memfd_create",
    )
    yield _tried(
        "ends of processes",
        _notice_an_end,
        well="pidfd_open works",
        cost="servers cannot notice at once that a trainer has died, and do not start",
        cure="a kernel from 5.3 on, and a container runtime whose seccomp profile allows pidfd_open",
    )
    place = Path(tempfile.gettempdir()) if runtime_dir is None else runtime_dir
    yield _tried(
        "socket directory",
        lambda: _pass_a_descriptor(place),
        well=f"a descriptor was passed through a socket in {place}",
        cost="a server cannot start with its socket there; without a socket rows go by a slower door",
        cure="a directory that this user may write to, on a file system of this machine: server.runtime_dir, or TMPDIR",
    )


def _tried(name: str, call: Callable[[], None], *, well: str, cost: str, cure: str) -> Finding:
    try:
        call()
    except (OSError, AttributeError, EngineFailure) as error:
        return Finding(name=name, verdict="missing", found=str(error), cost=cost, cure=cure)
    return ok(name, well)


def _share() -> None:
    """What every slot of a slab goes through. Raises OSError or EngineFailure where it does not work."""
    with closing(create_segment(mmap.PAGESIZE)) as segment:
        segment.writable[0] = 1
        with map_readonly(segment.fd, segment.size_bytes) as mapped:
            if mapped[0] != 1:
                raise OSError("what one mapping writes another does not read")
        try:
            mmap.mmap(segment.fd, segment.size_bytes).close()
        except PermissionError:
            return
        raise OSError("the seal F_SEAL_FUTURE_WRITE does not keep others from writing")


def _notice_an_end() -> None:
    descriptor = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(descriptor, 0)  # 0 asks only whether it is there
    finally:
        os.close(descriptor)


def _pass_a_descriptor(directory: Path) -> None:
    """Through a socket at a path, as a broker does. Raises OSError."""
    if not directory.is_dir():
        raise NotADirectoryError(f"there is no directory {directory}")
    with (
        tempfile.TemporaryDirectory(prefix="kdmesh-doctor-", dir=directory) as own,
        unix_address(Path(own) / _SOCKET) as address,
        socket.socket(socket.AF_UNIX) as listening,
        socket.socket(socket.AF_UNIX) as asking,
        closing(create_segment(mmap.PAGESIZE)) as segment,
    ):
        listening.bind(address)
        listening.listen(1)
        asking.connect(address)
        answering, _ = listening.accept()
        with answering:
            socket.send_fds(answering, [b"1"], [segment.fd])
            _, descriptors, _, _ = socket.recv_fds(asking, 1, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        if not descriptors:
            raise OSError("the kernel passed no descriptor on")
