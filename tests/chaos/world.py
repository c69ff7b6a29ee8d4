"""What a drill disturbs, what must come of it all the same, and what must not be left."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.tiny_models import TinyModels
from tests.system.guard import Guard
from tests.system.processes import Process, Processes
from tests.system.teachers import Teacher
from tests.system.training import Job, Recipe

RANKS = 2
JOBS = ("plain", "other", "third")
LEASE_S = 3.0
_DRILL_S = 600.0
_SETTLE_S = 60.0


@dataclass(slots=True)
class Running:
    """A job that is started again whenever it has ended badly."""

    job: Job
    process: Process
    starts: int = 1

    def tend(self) -> bool:
        """Whether it has ended well; starts it again where it has ended otherwise."""
        if not self.process.has_ended():
            return False
        if self.process.exit_code() == 0:
            return True
        self.process = self.job.start_ranks(RANKS)
        self.starts += 1
        return False

    def ranks(self) -> list[psutil.Process]:
        """Its trainer processes; none while they start."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []


def tend_all(running: Iterable[Running]) -> bool:
    """Whether all have ended well; each that has ended otherwise is started again."""
    return not [each for each in running if not each.tend()]


class World:
    """Teachers that serve until the end of the session, restarted by whoever kills them."""

    def __init__(self, processes: Processes, directory: Path, models: TinyModels, data: Path) -> None:
        self.processes = processes
        self._directory = directory
        self._drills = 0
        self._guard: Guard | None = None
        self._model = models.path("qwen3", seed=2, hidden_size=48, vocab_size=336)
        self.teachers = self._new_teachers()
        plain = Recipe(
            student=models.path("qwen3", seed=1), data=data, objective={"divergence": {"name": "forward_kl"}}
        )
        other = Recipe(
            student=models.path("llama", seed=3, hidden_size=24, vocab_size=352),
            data=data,
            objective={"divergence": {"name": "jensen_shannon", "beta": 0.3}, "ce_weight": 0.2, "temperature": 2.0},
            is_judged=True,
        )
        self._recipes = dict(zip(JOBS, ((plain, {}), (other, {}), (plain, {"seed": 5})), strict=True))
        self._undisturbed: dict[str, list[dict[str, Any]]] = {}
        self._start_teachers()

    def learn_undisturbed(self) -> None:
        """Fill in what `must_be_undisturbed` compares with."""
        jobs = self._jobs(self._directory / "undisturbed")
        for process in [job.start_ranks(RANKS) for job in jobs.values()]:
            process.succeed()
        self._undisturbed = {name: job.record() for name, job in jobs.items()}
        assert all(len(record) >= 16 for record in self._undisturbed.values())

    @contextmanager
    def beside(
        self, name: str, *, guard: Guard | None = None, through: Sequence[str] = (), **sections: Mapping[str, Any]
    ) -> Iterator[World]:
        """The same jobs with two teachers of their own, which end with the `with`. See Teacher."""
        other = copy.copy(self)
        other._directory, other._guard = self._directory / name, guard
        other.teachers = other._new_teachers(through, **sections)
        other._start_teachers()
        yield other
        for teacher in other.teachers:
            teacher.process.signal(signal.SIGTERM)
        for teacher in other.teachers:
            teacher.process.succeed()

    @contextmanager
    def drill(self) -> Iterator[list[Running]]:
        """Three jobs that run. Behind it all have ended as if nothing had been, and nothing is left of them."""
        self._drills += 1
        self._mend_teachers()  # a drill that failed may have left them dead
        before = [_holdings(teacher) for teacher in self.teachers]
        jobs = self._jobs(self._directory / f"drill-{self._drills}")
        running = [Running(job, job.start_ranks(RANKS)) for job in jobs.values()]
        yield running
        ends_s = time.monotonic() + _DRILL_S
        while not tend_all(running):
            self.tend_teachers()
            assert time.monotonic() < ends_s, "the jobs do not end"
            time.sleep(0.1)
        self._mend_teachers()
        for name, job in jobs.items():
            assert job.record() == self._undisturbed[name], f"job {name} learnt something else"
        for teacher, old in zip(self.teachers, before, strict=True):
            until(
                lambda teacher=teacher, old=old: _holdings(teacher).are_only(old), f"{teacher.address} keeps something"
            )

    def tend_teachers(self) -> None:
        """Start those again that have ended."""
        for teacher in self.teachers:
            if teacher.process.has_ended():
                teacher.start()

    def _mend_teachers(self) -> None:
        self.tend_teachers()
        for teacher in self.teachers:
            teacher.wait_ready()

    def _new_teachers(self, through: Sequence[str] = (), **sections: Mapping[str, Any]) -> list[Teacher]:
        tree: dict[str, Mapping[str, Any]] = {
            "slab": {"lease_s": LEASE_S, "claim_s": LEASE_S},
            "jobs": {"overrides": {"hog": {"max_bytes_in_flight": 2**20}}},
            **sections,
        }
        reading = None if self._guard is None else self._guard.reading()
        if self._guard is not None:
            tree["server"] = self._guard.server()
        directories = [self._directory / f"teacher-{number}" for number in range(2)]
        return [
            Teacher(self.processes, each, self._model, reading=reading, through=through, **tree) for each in directories
        ]

    def _start_teachers(self) -> None:
        for teacher in self.teachers:
            teacher.start()
        for teacher in self.teachers:
            teacher.wait_ready()

    def _jobs(self, root: Path) -> dict[str, Job]:
        return {name: self._job(root, name) for name in JOBS}

    def _job(self, root: Path, name: str) -> Job:
        recipe, sections = self._recipes[name]
        addresses = [teacher.address for teacher in self.teachers]
        access = {} if self._guard is None else {"access": self._guard.access(name)}
        return Job(self.processes, root / name, recipe, *addresses, teacher=access, checkpoint={"every": 2}, **sections)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What a teacher has open for others; of a restarted one, what a fresh one has."""

    sessions: int
    slots: int  # that are not free
    descriptors: int
    threads: int

    def are_only(self, before: Holdings) -> bool:
        """Nobody's, and the server's as before: connections come and go, and threads are begun when first needed."""
        return (
            self.sessions == 0
            and self.slots == 0
            and self.descriptors <= before.descriptors + 10
            and self.threads <= before.threads + 10
        )


def _holdings(teacher: Teacher) -> Holdings:
    slab, process = teacher.get("/v1/slab"), psutil.Process(teacher.process.pid)
    return Holdings(
        sessions=len(teacher.get("/v1/sessions")["sessions"]),
        slots=sum(count for state, count in slab["slots"].items() if state != "free"),
        descriptors=process.num_fds(),
        threads=process.num_threads(),
    )


def until(is_so: Callable[[], object], what: str, *, within_s: float = _SETTLE_S) -> None:
    """Return when `is_so`; fails with `what` when that takes too long."""
    ends_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends_s, what
        time.sleep(0.05)
