"""What is told of the jobs of a server: to people, to programs, and to metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdmesh.serving.jobs.fair_queue import FairQueue
from kdmesh.serving.jobs.table import JobTable


@dataclass(slots=True, kw_only=True)
class Holdings:
    """What a job holds of a server besides its engine."""

    sessions: int = 0
    slots: int = 0  # of the slab
    slab_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One job at one moment."""

    job: str
    terms: Mapping[str, Any]  # what it may take
    is_overridden: bool  # it has other terms than the defaults
    sessions: int
    slots: int
    slab_bytes: int
    abandoned_slots: int
    waiting_requests: int
    waiting_tokens: int
    tokens_in_flight: int
    tokens: int  # computed for it so far
    tokens_per_s: float
    share: float  # of the tokens that all jobs got lately
    wait_p50_s: float | None  # of its newest requests, from arrival to start; None: there were none
    wait_p99_s: float | None
    refusals: Mapping[str, int]  # by what was short

    @property
    def is_present(self) -> bool:
        """Whether it holds anything, or waits."""
        return bool(self.sessions or self.slots or self.waiting_requests or self.tokens_in_flight)


def job_states(
    table: JobTable[Any], queue: FairQueue[Any], holdings: Mapping[str, Holdings], only: str | None = None
) -> Sequence[JobState]:
    """Of every job that is known, by name; or of one, known or not."""
    known = {*table.books(), *table.overrides, *queue.jobs(), *holdings}
    rates = {job: table.tokens_per_s(job) for job in known}
    total_per_s = sum(rates.values())
    names = sorted(known) if only is None else [only]
    states = []
    for job in names:
        per_s = rates.get(job, 0.0)
        rate = _Rate(per_s=per_s, share=per_s / total_per_s if total_per_s else 0.0)
        states.append(_state(job, table, queue, holdings.get(job, Holdings()), rate))
    return states


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rate:
    per_s: float
    share: float


def _state(job: str, table: JobTable[Any], queue: FairQueue[Any], holds: Holdings, rate: _Rate) -> JobState:
    book = table.books().get(job)
    waits_s = sorted(book.waits_s) if book else []
    return JobState(
        job=job,
        terms=table.terms(job).model_dump(mode="json"),
        is_overridden=job in table.overrides,
        sessions=holds.sessions,
        slots=holds.slots,
        slab_bytes=holds.slab_bytes,
        abandoned_slots=book.abandoned_slots if book else 0,
        waiting_requests=queue.requests_of(job),
        waiting_tokens=queue.tokens_of(job),
        tokens_in_flight=book.tokens_in_flight if book else 0,
        tokens=book.tokens if book else 0,
        tokens_per_s=rate.per_s,
        share=rate.share,
        wait_p50_s=_percentile(waits_s, 0.5),
        wait_p99_s=_percentile(waits_s, 0.99),
        refusals={shortage.value: count for shortage, count in book.refusals.items()} if book else {},
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float | None:
    return ordered[min(int(len(ordered) * fraction), len(ordered) - 1)] if ordered else None
