"""The RDMA door over NIXL's test transports on one machine: what the door costs, not what RDMA does.

Both transports read in software. process_vm_readv copies once, by the reader's processor; TCP is the loopback's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import finish, say, server, table
from benchmarks.transport import BYTES, Timings, time_door
from kdmesh.allocator import keep_freed_memory
from kdmesh.handles.rdma.agent import UNSAFE_VALUE, UNSAFE_VARIABLE, Agent
from kdmesh.rpc.teachers.doors import DoorChoice

_CASES: Sequence[tuple[str, DoorChoice, str]] = (
    ("rdma door, process_vm_readv", "rdma", "tcp,cma,posix,self"),
    ("rdma door, TCP", "rdma", "tcp,self"),
    ("stream", "stream", "tcp,self"),
)
_IDLE_S = 3.0


def _measure(door: DoorChoice, transports: str, repeats: int) -> Timings:
    os.environ |= {"UCX_TLS": transports, UNSAFE_VARIABLE: UNSAFE_VALUE}
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        with server([sys.executable, "-m", "benchmarks.replay_server", str(ready), "rdma"], ready) as address:
            return asyncio.run(time_door(address, door, repeats))


def _idle_share() -> float:
    """Of one core, that an agent takes which others may read, while nobody does."""
    agent = Agent(is_read=True)
    began_s = time.process_time()
    time.sleep(_IDLE_S)
    share = (time.process_time() - began_s) / _IDLE_S
    del agent
    return share


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="answers measured in each case")
    repeats = parser.parse_args().repeats
    keep_freed_memory()  # as a trainer does
    timings = [(name, _measure(door, transports, repeats)) for name, door, transports in _CASES]
    median = statistics.median
    say(f"{BYTES // 2**20} MiB answers, medians; no RDMA hardware:")
    table(
        ["door", "engine to tensor", "handle to tensor", "GB/s of the door", "request to tensor"],
        [
            [
                name,
                f"{median(t.delivered) * 1e3:.1f} ms",
                f"{median(t.fetched) * 1e3:.1f} ms",
                f"{BYTES / median(t.fetched) / 1e9:.2f}",
                f"{median(t.asked) * 1e3:.1f} ms",
            ]
            for name, t in timings
        ],
    )
    idle = _idle_share()
    say(f"an idle agent of a server takes {idle * 100:.1f} % of a core")
    vm, tcp, stream = (round(BYTES / median(t.fetched) / 1e9, 2) for _, t in timings)
    finish(
        "transport_rdma",
        {
            "process_vm_readv_gb_per_s": vm,
            "tcp_gb_per_s": tcp,
            "stream_gb_per_s": stream,
            "idle_share_of_a_core": round(idle, 4),
        },
    )


if __name__ == "__main__":
    main()
