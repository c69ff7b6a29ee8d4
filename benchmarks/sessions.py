"""Many sessions on one server: what a small request costs, how long a handle takes, and what a session weighs."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psutil

from benchmarks.measure import finish, say, table
from benchmarks.shared_server import request_of, shared_server
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions

_TOKENS = 16  # of a request, one row of which is asked for
_JOBS = 20  # that the sessions belong to


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One process's part of the clients."""

    address: str
    first: int  # number of its first session
    sessions: int
    per_s: float  # requests, over its sessions
    seconds: float


async def _one_session(client: TeacherClient, load: Load, number: int, began_s: float, waits_s: list[float]) -> None:
    """A request each period, on time whether or not the one before was answered."""
    period_s = load.sessions / load.per_s
    sequences = request_of(_TOKENS)

    async def ask() -> None:
        asked_s = time.monotonic()
        rows = await client.prefill(sequences, Deadline.after(60))
        waits_s.append(time.monotonic() - asked_s)
        del rows

    next_s = began_s + period_s * number / load.sessions
    async with asyncio.TaskGroup() as open_requests:
        while next_s < began_s + load.seconds:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            open_requests.create_task(ask())
            next_s += period_s


async def _clients(load: Load, pipe: Connection) -> None:
    clients = []
    for number in range(load.first, load.first + load.sessions):
        clients.append(
            await TeacherClient.connect(load.address, SessionOptions(job=f"job-{number % _JOBS}", door="shm"))
        )
    for client in clients:  # each has mapped a slot
        (await client.prefill(request_of(_TOKENS), Deadline.after(60))).rows_RD.sum()
    pipe.send("connected")
    await asyncio.to_thread(pipe.recv)
    waits_s: list[float] = []
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    async with asyncio.TaskGroup() as sessions:
        for number, client in enumerate(clients):
            sessions.create_task(_one_session(client, load, number, began_s, waits_s))
    pipe.send((waits_s, time.monotonic() - began_s, time.process_time() - began_cpu_s))
    await asyncio.to_thread(pipe.recv)
    for client in clients:
        await client.close()


def _process(load: Load, pipe: Connection) -> None:
    asyncio.run(_clients(load, pipe))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the clients saw, and what it cost the server."""

    waits_s: Sequence[float]
    seconds: float
    server_cpu_s: float
    clients_cpu_s: float
    bytes_per_session: float


def _measure(sessions: int, per_s: float, seconds: float, processes: int) -> Outcome:
    with shared_server(
        engine={"seconds_per_batch": 0.0, "hidden_size": 8},
        slab={"slots": 256, "slot_mib": 0.0625, "slots_per_session": 8},
    ) as server:
        process = psutil.Process(server.pid)
        empty_bytes = process.memory_info().rss
        context = multiprocessing.get_context("spawn")
        pipes = []
        children = []
        for part in range(processes):
            load = Load(
                address=server.grpc,
                first=part * sessions // processes,
                sessions=sessions // processes,
                per_s=per_s / processes,
                seconds=seconds,
            )
            here, there = context.Pipe()
            child = context.Process(target=_process, args=(load, there))
            child.start()
            pipes.append(here)
            children.append(child)
        for pipe in pipes:
            pipe.recv()
        full_bytes = process.memory_info().rss
        cpu_before = process.cpu_times()
        for pipe in pipes:
            pipe.send("begin")
        results = [pipe.recv() for pipe in pipes]
        cpu_after = process.cpu_times()
        for pipe, child in zip(pipes, children, strict=True):
            pipe.send("end")
            child.join()
    return Outcome(
        waits_s=sorted(wait_s for waits_s, _, _ in results for wait_s in waits_s),
        seconds=max(took_s for _, took_s, _ in results),
        server_cpu_s=cpu_after.user + cpu_after.system - cpu_before.user - cpu_before.system,
        clients_cpu_s=sum(cpu_s for _, _, cpu_s in results),
        bytes_per_session=(full_bytes - empty_bytes) / sessions,
    )


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[250, 500, 1000, 2000], help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate")
    parser.add_argument("--processes", type=int, default=1, help="that the clients are divided over")
    arguments = parser.parse_args()
    say(
        f"{arguments.sessions} sessions of {_JOBS} jobs; requests of {_TOKENS} tokens and one row, rows mapped and read"
    )
    rows = []
    figures: dict[str, object] = {}
    for per_s in arguments.rates:
        outcome = _measure(arguments.sessions, per_s, arguments.seconds, arguments.processes)
        count = len(outcome.waits_s)
        p50, p99 = (outcome.waits_s[int(count * fraction)] for fraction in (0.5, 0.99))
        cpu_us = outcome.server_cpu_s / count * 1e6
        rows.append(
            [
                f"{per_s:.0f}",
                f"{count / outcome.seconds:.0f}",
                f"{p50 * 1000:.1f} ms",
                f"{p99 * 1000:.1f} ms",
                f"{cpu_us:.0f} us",
                f"{outcome.clients_cpu_s / count * 1e6:.0f} us",
                f"{(outcome.server_cpu_s + outcome.clients_cpu_s) / outcome.seconds:.2f}",
                f"{outcome.bytes_per_session / 1024:.0f} KiB",
            ]
        )
        figures = {
            "answered_per_s": round(count / outcome.seconds),
            "p99_s": round(p99, 4),
            "server_cpu_us": round(cpu_us),
            "bytes_per_session": round(outcome.bytes_per_session),
        }
    table(
        [
            "asked a second",
            "answered",
            "p50",
            "p99",
            "server's CPU each",
            "clients' CPU each",
            "cores used",
            "memory of a session",
        ],
        rows,
    )
    finish("sessions", figures)


if __name__ == "__main__":
    main()
