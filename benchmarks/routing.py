"""How evenly 1,024 trainer ranks that decide alone load 64 teachers, under a virtual clock.

The Router is the one that trainers use. Beside it: every rank in turn (round robin), and KDFlow's order, where a driver
for each job gives every micro-batch of a step to the teacher with the fewest tokens of that step.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.measure import finish, say, table
from benchmarks.routing_choices import InTurn, Planned, Routed
from benchmarks.routing_fleet import Choice, Clock, Demand, Job, Rank, Teacher
from kdmesh.rpc.fleet.routing import DEFAULT_ROUTING

_TEACHERS, _RANKS, _JOBS = 64, 1024, 4
_TOKENS_PER_S = 20_000.0
_WARM_UP_S = 30.0
_SLOW = 4  # teachers of half the speed, in the uneven fleet
_FAILING = 10  # its number there
_DIES_S, _RETURNS_S = 90.0, 150.0
_AIM = 0.02

Make = Callable[..., Choice]
CHOICES: dict[str, Make] = {
    "round robin": InTurn,
    "KDFlow's order": Planned,
    "Router, told by replies only": partial(Routed, policy=DEFAULT_ROUTING, asks=False),
    "Router": partial(Routed, policy=DEFAULT_ROUTING, asks=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A fleet and how hard it is worked."""

    name: str
    is_uneven: bool
    demand_of_capacity: float  # what ranks would train if they never waited

    @property
    def equals(self) -> Sequence[int]:
        """Numbers of the teachers that should get the same."""
        return [k for k in range(_TEACHERS) if not self.is_uneven or (k >= _SLOW and k != _FAILING)]


SCENARIOS = (
    Scenario(name="teachers are the bottleneck", is_uneven=False, demand_of_capacity=3.0),
    Scenario(name="4 of half the speed, 1 dies for a minute", is_uneven=True, demand_of_capacity=3.0),
    Scenario(name="teachers have time to spare", is_uneven=False, demand_of_capacity=1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one simulation came to, after the warm-up."""

    imbalance: float  # 1 - mean / max of tokens, over the teachers that should get the same
    worst_minute: float  # the same, of the worst minute
    tokens_per_s: float  # of all teachers
    of_capacity: float
    wait_p99_s: float
    returned: float  # tokens of the failing one in the half minute after its return, to what it would get for good


def simulate(scenario: Scenario, make: Make, seconds: float, seed: int) -> Outcome:
    """One run."""
    clock = Clock()
    speeds = [_TOKENS_PER_S / 2 if scenario.is_uneven and k < _SLOW else _TOKENS_PER_S for k in range(_TEACHERS)]
    teachers = {f"teacher {k}": Teacher(clock, f"teacher {k}", speed) for k, speed in enumerate(speeds)}
    demand = Demand(
        mean_tokens=4096,
        sigma=0.8,
        micro_batches=8,
        prefetch=4,
        train_tokens_per_s=scenario.demand_of_capacity * _TEACHERS * _TOKENS_PER_S / _RANKS,
    )
    jobs = [Job(clock, demand, ranks=_RANKS // _JOBS, teachers=_TEACHERS, seed=seed + k) for k in range(_JOBS)]
    ranks = [rank for job in jobs for rank in job.ranks]
    for number, rank in enumerate(ranks):
        rank.choice = make(clock, teachers, seed=seed * _RANKS + number)
    for number, job in enumerate(jobs):
        clock.after(0.37 * number, job.begin)
    if scenario.is_uneven:
        _let_one_fail(clock, list(teachers.values())[_FAILING], ranks)
    clock.run(seconds)
    return _outcome(scenario, list(teachers.values()), ranks, seconds)


def _let_one_fail(clock: Clock, teacher: Teacher, ranks: Sequence[Rank]) -> None:
    """Ranks notice that it is gone within 0.1 s, and that it is back within 2 s, as their connections do."""
    rng = random.Random(0)

    def lose() -> None:
        teacher.die()
        for rank in ranks:
            clock.after(0.1 * rng.random(), partial(rank.choice.lost, teacher.name))

    def find() -> None:
        teacher.come_back()
        for rank in ranks:
            clock.after(2 * rng.random(), partial(rank.choice.found, teacher.name))

    clock.after(_DIES_S, lose)
    clock.after(_RETURNS_S, find)


def _outcome(scenario: Scenario, teachers: Sequence[Teacher], ranks: Sequence[Rank], seconds: float) -> Outcome:
    equals = [teachers[k] for k in scenario.equals]
    minutes = range(round(_WARM_UP_S), round(seconds) - 59, 60)
    total = sum(teacher.tokens(_WARM_UP_S, seconds) for teacher in teachers)
    waits_s = sorted(wait_s for rank in ranks for wait_s in rank.waits_s)
    usual = sum(one.tokens(_RETURNS_S, _RETURNS_S + 30) for one in equals) / len(equals)
    return Outcome(
        imbalance=_imbalance(equals, _WARM_UP_S, seconds),
        worst_minute=max(_imbalance(equals, begin_s, begin_s + 60) for begin_s in minutes),
        tokens_per_s=total / (seconds - _WARM_UP_S),
        of_capacity=total / (seconds - _WARM_UP_S) / sum(teacher.tokens_per_s for teacher in teachers),
        wait_p99_s=waits_s[len(waits_s) * 99 // 100],
        returned=teachers[_FAILING].tokens(_RETURNS_S, _RETURNS_S + 30) / usual,
    )


def _imbalance(teachers: Sequence[Teacher], begin_s: float, end_s: float) -> float:
    tokens = [teacher.tokens(begin_s, end_s) for teacher in teachers]
    return 1 - sum(tokens) / len(tokens) / max(tokens)


def _show(scenario: Scenario, outcomes: Mapping[str, Outcome]) -> None:
    say(f"\n{scenario.name}\n")
    header = ["chosen by", "imbalance", "worst minute", "tokens/s", "of capacity", "p99 of a wait"]
    if scenario.is_uneven:
        header.append("after its return")
    rows: list[list[object]] = []
    for name, outcome in outcomes.items():
        rows.append(
            [
                name,
                f"{outcome.imbalance:.2%}",
                f"{outcome.worst_minute:.1%}",
                f"{outcome.tokens_per_s:,.0f}",
                f"{outcome.of_capacity:.1%}",
                f"{outcome.wait_p99_s:.1f} s",
                *([f"{outcome.returned:.0%}"] if scenario.is_uneven else ()),
            ]
        )
    table(header, rows)


def main(arguments: Sequence[str]) -> None:
    """Simulate, print the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.routing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="virtual ones, of each run; at least 210")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    began_s = time.perf_counter()
    figures: dict[str, dict[str, float]] = {}
    for scenario in SCENARIOS:
        outcomes = {name: simulate(scenario, make, options.seconds, options.seed) for name, make in CHOICES.items()}
        _show(scenario, outcomes)
        figures[scenario.name] = {name: outcome.imbalance for name, outcome in outcomes.items()}
    is_met = all(of_choice["Router"] < _AIM for of_choice in figures.values())
    say(f"\naim: the Router's under {_AIM:.0%}: {'met' if is_met else 'MISSED'}")
    finish("routing", {"imbalance": figures, "is_met": is_met, "seconds": round(time.perf_counter() - began_s, 1)})


if __name__ == "__main__":
    main(sys.argv[1:])
