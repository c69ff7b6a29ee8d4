"""Two hosts on this machine: network namespaces with a wire between them that is slow, lossy or cut as a test wants.

A namespace has a kernel's whole network stack of its own. The wire is a thread that hands packets from one tun device
to the other, so it needs root and /dev/net/tun, and neither veth nor the kernel's netem.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_CLONE_NEWNET = 0x40000000
_MTU = 9000
_LIBC = ctypes.CDLL(None, use_errno=True)


def obstacle() -> str:
    """Why there can be no hosts on this machine; empty when there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs ip and unshare"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0:
        return "may not make network namespaces"
    return ""


@dataclass(frozen=True, slots=True)
class Host:
    """One of them."""

    namespace: str
    address: str

    def command(self, *command: str, hidden: Path | None = None) -> list[str]:
        """`command`, run on this host; the directory `hidden` is another, empty one there."""
        inside = ["ip", "netns", "exec", self.namespace, *command]
        if hidden is None:
            return inside
        return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{hidden}" && exec "$@"', "sh", *inside]


class Wire:
    """Between two hosts. Each of its properties may be changed at any time.

    Attributes:
        delay_s: of every packet, one way.
        loss: share of packets that are lost.
        is_cut: whether all are.
    """

    def __init__(self, ends: tuple[int, int]) -> None:
        """`ends`: the descriptors of both tun devices, which this takes over."""
        self.delay_s = 0.0
        self.loss = 0.0
        self.is_cut = False
        self.num_packets = self.num_lost = self.num_bytes = 0
        self._ends = ends
        self._chance = random.Random(0)
        self._stop_r, self._stop_w = os.pipe()
        self._thread = threading.Thread(target=self._run, name="wire")
        self._thread.start()

    def close(self) -> None:
        """End it."""
        os.close(self._stop_w)
        self._thread.join()
        for fd in (*self._ends, self._stop_r):
            os.close(fd)

    def _run(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        while True:
            wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            ready, _, _ = select.select((*self._ends, self._stop_r), (), (), wait_s)
            if self._stop_r in ready:
                return
            for end in ready:
                packet = os.read(end, 2**16)
                self.num_packets += 1
                self.num_bytes += len(packet)
                if self.is_cut or self._chance.random() < self.loss:
                    self.num_lost += 1
                    continue
                heapq.heappush(under_way, (time.monotonic() + self.delay_s, self.num_packets, other[end], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # its queue is full: lost, as on any wire
                    os.write(end, packet)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Wire]]:
    """Both, and what connects them."""
    hosts = [Host(f"kdmesh{os.getpid()}{name}", f"10.77.0.{i}") for i, name in ((1, "a"), (2, "b"))]
    with contextlib.ExitStack() as stack:
        ends = []
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
            ends.append(_tun(host.namespace))
            for command in (
                ["addr", "add", f"{host.address}/24", "dev", "wire"],
                ["link", "set", "wire", "mtu", str(_MTU), "up"],
                ["link", "set", "lo", "up"],
            ):
                _ip("-n", host.namespace, *command)
        wire = Wire((ends[0], ends[1]))
        stack.callback(wire.close)
        yield hosts[0], hosts[1], wire


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _tun(namespace: str) -> int:
    """A tun device called wire in that namespace."""
    made: list[int] = []

    def make() -> None:
        # A namespace belongs to a thread, and this one ends with what it was lent.
        with open(f"/run/netns/{namespace}", "rb") as file:
            if _LIBC.setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN | _IFF_NO_PI))
        made.append(fd)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (fd,) = made
    return fd
