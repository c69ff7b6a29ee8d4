"""How a teacher is divided between jobs that all ask for more than it can do, and what a flood does to the others."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from benchmarks.measure import Server, finish, say, table
from benchmarks.shared_server import job_states, request_of, shared_server
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions

_BATCH_TOKENS, _BATCH_S = 4096, 0.1
_SHORTEST, _LONGEST = 64, 512  # tokens of a request
_DEMANDS = {"one": 16, "four": 64, "sixteen": 256}  # requests that a job has open all the time: 1 : 4 : 16
_WEIGHTS = ({"one": 1.0, "four": 1.0, "sixteen": 1.0}, {"one": 1.0, "four": 2.0, "sixteen": 4.0})
_ALLOWED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a while of asking came to."""

    tokens: Mapping[str, int]  # computed, by job
    least_waiting: int  # tokens of the job that had the fewest waiting, at any look
    waits_s: Mapping[str, Sequence[float]]  # of each job's requests, from asking to the rows


async def _ask(client: TeacherClient, draw: random.Random, waits_s: list[float]) -> None:
    """One request after the other, until cancelled."""
    while True:
        sequences = request_of(draw.randint(_SHORTEST, _LONGEST))
        began_s = time.monotonic()
        rows = await client.prefill(sequences, Deadline.after(120))
        waits_s.append(time.monotonic() - began_s)
        del rows


async def _run(server: Server, demands: Mapping[str, int], *, warm_up_s: float, seconds: float) -> Run:
    waits_s: dict[str, list[float]] = {job: [] for job in demands}
    async with AsyncExitStack() as stack:
        asking = []
        for job, demand in demands.items():
            client = await TeacherClient.connect(server.grpc, SessionOptions(job=job, door="shm"))
            stack.push_async_callback(client.close)
            asking += [
                asyncio.create_task(_ask(client, random.Random(f"{job} {number}"), waits_s[job]))
                for number in range(demand)
            ]
        await asyncio.sleep(warm_up_s)
        for waits in waits_s.values():
            waits.clear()
        before = await asyncio.to_thread(job_states, server)
        ends_s, least = time.monotonic() + seconds, 10**9
        now = before
        while time.monotonic() < ends_s:
            await asyncio.sleep(0.2)
            now = await asyncio.to_thread(job_states, server)
            least = min(least, *(now[job]["waiting_tokens"] for job in demands))
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        _raise_failures(asking)
    tokens = {job: now[job]["tokens"] - before[job]["tokens"] for job in demands}
    return Run(tokens=tokens, least_waiting=least, waits_s=waits_s)


def _raise_failures(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


def _served(demands: Mapping[str, int], weights: Mapping[str, float], *, warm_up_s: float, seconds: float) -> Run:
    with shared_server(
        engine={"max_batch_tokens": _BATCH_TOKENS, "seconds_per_batch": _BATCH_S},
        slab={"slots": 512, "slot_mib": 0.0625, "slots_per_session": 512},
        jobs={"overrides": {job: {"weight": weight} for job, weight in weights.items()}},
    ) as server:
        return asyncio.run(_run(server, demands, warm_up_s=warm_up_s, seconds=seconds))


def _jain(values: Sequence[float]) -> float:
    """1: all equal; 1/n: one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def _shares(seconds: float) -> dict[str, float]:
    rows = []
    worst = 0.0
    jain = 1.0
    for weights in _WEIGHTS:
        run = _served(_DEMANDS, weights, warm_up_s=2.0, seconds=seconds)
        total, total_weight = sum(run.tokens.values()), sum(weights.values())
        index = _jain([run.tokens[job] / weights[job] for job in weights])
        jain = min(jain, index)
        for job, weight in weights.items():
            share, due = run.tokens[job] / total, weight / total_weight
            worst = max(worst, abs(share / due - 1))
            rows.append(
                [
                    ":".join(f"{w:g}" for w in weights.values()),
                    f"{_DEMANDS[job]} requests",
                    f"{due:.3f}",
                    f"{share:.3f}",
                    f"{share / due - 1:+.1%}",
                    f"{index:.5f}",
                    run.least_waiting,
                ]
            )
    table(["weights", "demand", "share due", "share got", "off by", "Jain index", "fewest tokens waiting"], rows)
    return {"worst_share_error": round(worst, 4), "jain": round(jain, 5)}


def _flood(seconds: float) -> dict[str, float]:
    """A victim that asks for little: alone, beside two jobs that keep the teacher busy, and when one of them floods."""
    others = {
        "nobody else asks": {},
        "two jobs with 32 requests each": {"busy": 32, "flood": 32},
        "one with 32, and a flood of 512": {"busy": 32, "flood": 512},
    }
    p99: list[float] = []
    rows = []
    for name, beside in others.items():
        demands = {"victim": 4, **beside}
        run = _served(demands, dict.fromkeys(demands, 1.0), warm_up_s=2.0, seconds=seconds)
        waits_s = sorted(run.waits_s["victim"])
        p99.append(waits_s[int(len(waits_s) * 0.99)])
        p50 = waits_s[len(waits_s) // 2]
        rows.append([name, len(waits_s), f"{p50 * 1000:.0f} ms", f"{p99[-1] * 1000:.0f} ms"])
    table(["beside the victim's 4 requests", "requests of the victim", "p50", "p99"], rows)
    alone, busy, flooded = p99
    return {"flood_p99_ratio": round(flooded / busy, 3), "flood_p99_ratio_to_alone": round(flooded / alone, 3)}


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    arguments = parser.parse_args()
    say(f"Batches of {_BATCH_TOKENS} tokens take {_BATCH_S:g} s; requests have {_SHORTEST} to {_LONGEST} tokens.")
    figures = _shares(arguments.seconds)
    say(f"worst share is off by {figures['worst_share_error']:.1%}; at most {_ALLOWED:.0%} is the aim")
    figures |= _flood(arguments.seconds)
    say(f"the flood makes the victim's p99 {figures['flood_p99_ratio']:.2f} times as long; at most 1.5 is the aim")
    finish("fairness", figures)


if __name__ == "__main__":
    main()
