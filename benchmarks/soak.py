"""Whether two teachers and their jobs are after an hour what they were at its start: as fast, and no larger.

Three trainers ask both teachers without end; beside them one job after the other comes, works and goes, every second
one killed. The fake engine takes a fixed time for each token, so that the speed says what the service costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import httpx
import psutil
import yaml

from benchmarks.measure import Server, finish, say, started, table
from benchmarks.soak_clients import MAX_TOKENS, VOCABULARY_SIZE, Trainer, run_job, trainers
from kdmesh.rpc.teachers.doors import DoorChoice

_DOORS: tuple[DoorChoice, ...] = ("shm", "shm", "stream")
_HIDDEN_SIZE = 64
_SLOTS = 6  # of each teacher; fewer than are wanted, so that every client has soon mapped each
_EVERY_S = 1.0
_SETTLE_S = 30.0  # what is loaded and mapped once is there by then
_MAX_LOSS = 0.03
_MAX_GROWTH_MIB = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at everything."""

    at_s: float
    rows: int  # that clients, also those that left, have got so far
    cpu_s: float  # of all these processes so far
    private_mib: dict[str, float]  # by process: memory of its own, without what it shares
    fds: dict[str, int]
    threads: dict[str, int]
    held_slots: int  # of all servers, not free


@contextmanager
def _teachers(folder: Path) -> Iterator[list[Server]]:
    engine = {
        "kind": "fake",
        "hidden_size": _HIDDEN_SIZE,
        "vocabulary_size": VOCABULARY_SIZE,
        "max_batch_tokens": MAX_TOKENS,
        "seconds_per_token": 5e-5,  # a micro-batch takes a fifth of a second, as with a model on a GPU
    }
    tree = {
        "engine": engine,
        "server": {"port": 0, "rest_port": 0},
        "slab": {"slots": _SLOTS, "slot_mib": 1, "lease_s": 5},
    }
    with ExitStack() as stack:
        servers = []
        for number in range(2):
            config, ready = folder / f"{number}.yaml", folder / f"{number}.json"
            config.write_text(yaml.safe_dump(tree), encoding="utf-8")
            command = [sys.executable, "-m", "kdmesh_teacher", str(config), "--ready-file", str(ready)]
            servers.append(stack.enter_context(started(command, ready)))
        yield servers


class _Watch:
    """Looks at processes."""

    def __init__(self, servers: Sequence[Server], clients: Sequence[Trainer]) -> None:
        self._servers = servers
        pids = {f"teacher {k}": server.pid for k, server in enumerate(servers)}
        pids |= {f"trainer {k} ({_DOORS[k]})": client.process.pid or 0 for k, client in enumerate(clients)}
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}

    def look(self) -> Sample:
        """As it is now."""
        memory = {name: process.memory_info() for name, process in self._processes.items()}
        return Sample(
            at_s=time.monotonic(),
            rows=sum(_delivered_rows(server) for server in self._servers),
            cpu_s=sum(sum(process.cpu_times()[:2]) for process in self._processes.values()),
            private_mib={name: (info.rss - info.shared) / 2**20 for name, info in memory.items()},
            fds={name: process.num_fds() for name, process in self._processes.items()},
            threads={name: process.num_threads() for name, process in self._processes.items()},
            held_slots=sum(_held(server) for server in self._servers),
        )


def _delivered_rows(server: Server) -> int:
    text = httpx.get(f"http://{server.rest}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("kdmesh_teacher_bytes_total{")]
    return round(sum(float(line.split()[1]) for line in lines)) // (4 * _HIDDEN_SIZE)


def _slab(server: Server) -> dict[str, int]:
    slots: dict[str, int] = httpx.get(f"http://{server.rest}/v1/slab").json()["slots"]
    return slots


def _held(server: Server) -> int:
    return _SLOTS - _slab(server)["free"]


@contextmanager
def _jobs(addresses: Sequence[str]) -> Iterator[Callable[[], int]]:
    """Jobs, one after the other; what is yielded says how many have ended."""
    stop, ended = threading.Event(), [0]

    def run() -> None:
        while not stop.is_set():
            run_job(addresses, ended[0])
            ended[0] += 1
            stop.wait(1.0)

    thread = threading.Thread(target=run, name="jobs")
    thread.start()
    try:
        yield lambda: ended[0]
    finally:
        stop.set()
        thread.join()


def _observe(watch: _Watch, seconds: float, clients: Sequence[Trainer], record: TextIO) -> list[Sample]:
    time.sleep(_SETTLE_S)
    samples = [watch.look()]
    while samples[-1].at_s < samples[0].at_s + seconds:
        time.sleep(_EVERY_S)
        samples.append(watch.look())
        record.write(json.dumps(asdict(samples[-1])) + "\n")
        if not all(client.is_there for client in clients):
            raise SystemExit("a trainer has ended by itself")
    return samples


def _rate(samples: Sequence[Sample]) -> float:
    return (samples[-1].rows - samples[0].rows) / (samples[-1].at_s - samples[0].at_s)


def _cpu_s_per_million(samples: Sequence[Sample]) -> float:
    return (samples[-1].cpu_s - samples[0].cpu_s) / (samples[-1].rows - samples[0].rows) * 1e6


def _slope_mib_per_h(samples: Sequence[Sample], name: str) -> float:
    times = [sample.at_s for sample in samples]
    line = statistics.linear_regression(times, [sample.private_mib[name] for sample in samples])
    return float(line.slope * 3600)


def _left_over(servers: Sequence[Server]) -> list[str]:
    """What is not given back when every client has ended, and its lease."""
    ends_s = time.monotonic() + 30
    while any(_held(server) for server in servers) and time.monotonic() < ends_s:
        time.sleep(0.5)
    left = []
    for number, server in enumerate(servers):
        sessions = httpx.get(f"http://{server.rest}/v1/sessions").json()["sessions"]
        if held := _held(server):
            left.append(f"teacher {number} holds {held} slots")
        if sessions:
            left.append(f"teacher {number} has {len(sessions)} sessions")
    return left


def _judge(samples: Sequence[Sample]) -> tuple[list[str], float]:
    """What is wrong, and the change of the speed, after the table.

    Memory counts from the second quarter on: until then allocators fill what they keep.
    """
    quarter = len(samples) // 4
    parts = [samples[:quarter], samples[quarter : 2 * quarter], samples[-quarter:]]
    change = _rate(parts[2]) / _rate(parts[0]) - 1
    wrong = [f"the speed changed by {change:+.1%}"] if abs(change) > _MAX_LOSS else []
    rows: list[list[object]] = [["rows/s", *(f"{_rate(part):,.0f}" for part in parts), f"{change:+.1%}"]]
    rows.append(["CPU s per million rows", *(f"{_cpu_s_per_million(part):.2f}" for part in parts), ""])
    for name in samples[0].fds:
        mib = [statistics.median(s.private_mib[name] for s in part) for part in parts]
        slope = _slope_mib_per_h(samples[quarter:], name)
        rows.append([f"{name}, own MiB", *(f"{of_part:.1f}" for of_part in mib), f"{slope:+.1f} MiB/h"])
        if mib[2] - mib[1] > max(_MAX_GROWTH_MIB, 0.01 * mib[1]):
            wrong.append(f"{name} grew by {mib[2] - mib[1]:.1f} MiB")
        for what, counts in (("descriptors", "fds"), ("threads", "threads")):
            medians = [statistics.median(getattr(s, counts)[name] for s in part) for part in parts]
            more = medians[2] - medians[0]
            rows.append([f"{name}, {what}", *(f"{median:g}" for median in medians), f"{more:+g}"])
            if more > 2 * _SLOTS:  # a slot is mapped when it is first seen
                wrong.append(f"{name} has {more:g} {what} more")
    slots = [f"{statistics.mean(s.held_slots for s in part):.1f}" for part in parts]
    rows.append([f"slots in use, of {2 * _SLOTS}", *slots, ""])
    table(["", "first quarter", "second", "last", "change"], rows)
    return wrong, change


def main(arguments: Sequence[str]) -> None:
    """Run for a while, print the table, and fail when something has grown or slowed down."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--record", type=Path, default=Path(os.devnull), help="file for every look, as lines of JSON")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        _teachers(Path(folder)) as servers,
        options.record.open("w", buffering=1, encoding="utf-8") as record,
    ):
        addresses = [server.grpc for server in servers]
        with trainers(addresses, _DOORS) as clients, _jobs(addresses) as num_jobs:
            samples = _observe(_Watch(servers, clients), options.minutes * 60, clients, record)
            jobs = num_jobs()
        wrong, change = _judge(samples)
        wrong += _left_over(servers)
    rows = samples[-1].rows - samples[0].rows
    say(f"\n{rows:,} rows and {jobs} short jobs in {options.minutes:g} minutes")
    say("flat" if not wrong else "NOT FLAT: " + "; ".join(wrong))
    finish("soak", {"minutes": options.minutes, "speed_change": change, "jobs": jobs, "wrong": wrong})
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
