"""The jobs of a server: what each may take, and what it has taken."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

from kdmesh import job_names
from kdmesh.errors import InvalidRequest
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.fair_queue import Standing
from kdmesh.serving.rate import DecayingRate, TokenBucket

T = TypeVar("T", bound=JobTerms)

FORGET_S = 900.0  # a job that did nothing for so long has left
_MAX_BOOKS = 1024  # names come from clients: with more, those silent for longest are forgotten at once
_NUM_WAITS = 512  # newest waits of a job, for its percentiles
_NONE: Mapping[str, Any] = {}
_RANKS = {"high": 0, "normal": 1, "low": 2}


class Shortage(StrEnum):
    """Why a request did not start, or was not let in."""

    QUEUE_FULL = "queue_full"
    ENGINE = "engine"  # others, or the job's own, were before it
    SLOTS = "slots"  # of the slab, or the session's share of them
    TOKENS_IN_FLIGHT = "max_tokens_in_flight"
    BYTES_IN_FLIGHT = "max_bytes_in_flight"
    REQUESTS_PER_S = "max_requests_per_s"


@dataclass(slots=True, kw_only=True)
class JobBook:
    """What one job has taken since the server started, or since it was forgotten."""

    bucket: TokenBucket
    tokens_rate: DecayingRate
    heard_s: float
    tokens_in_flight: int = 0
    tokens: int = 0  # computed
    abandoned_slots: int = 0
    refusals: Counter[Shortage] = field(default_factory=Counter)
    waits_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_WAITS))  # from arrival to start


class JobTable(Generic[T]):
    """Not thread-safe: it belongs to one event loop.

    Args:
        defaults: for every job.
        overrides: by the job's name, laid over the defaults; they can be changed while the server runs.
        look: says which overrides hold besides, and before those: the same mapping until they change.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        defaults: T,
        overrides: Mapping[str, T] | None = None,
        *,
        look: Callable[[], Mapping[str, T]] = lambda: _NONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.defaults = defaults
        self.on_change: Callable[[], None] = lambda: None
        """Called when terms have changed; what waits may start now."""

        self._configured = dict(overrides or {})
        self._look = look
        self._seen = look()
        self._overrides = {**self._configured, **self._seen}
        self._terms = {job: terms.over(defaults) for job, terms in self._overrides.items()}
        self._standings = {job: _standing(terms) for job, terms in self._terms.items()}
        self._default_standing = _standing(defaults)
        self._clock = clock
        self._books: dict[str, JobBook] = {}

    # Terms

    @property
    def overrides(self) -> Mapping[str, T]:
        """By the job's name, with the keys that they name."""
        return self._overrides

    def terms(self, job: str) -> T:
        """What the job may take."""
        return self._terms.get(job, self.defaults)

    def standing(self, job: str) -> Standing:
        """How the job stands to others."""
        return self._standings.get(job, self._default_standing)

    def override(self, job: str, terms: T) -> None:
        """From now on the job has these terms over the defaults, in place of those it had over them."""
        self._overrides[job] = terms
        self._terms[job] = terms.over(self.defaults)
        self._standings[job] = _standing(self._terms[job])
        self.on_change()

    def reset(self, job: str) -> None:
        """Take back what the job was given while the server ran."""
        terms = self._seen.get(job, self._configured.get(job))
        if terms is not None:
            self.override(job, terms)
            return
        for table in (self._overrides, self._terms, self._standings):
            table.pop(job, None)
        self.on_change()

    def look_again(self) -> None:
        """Take what `look` says now. Jobs whose terms are the same there keep what they were given meanwhile."""
        found, seen = self._look(), self._seen
        if found is seen:
            return
        self._seen = found
        for job in seen.keys() - found.keys():
            self.reset(job)
        for job, terms in found.items():
            if job not in seen or seen[job] != terms or seen[job].model_fields_set != terms.model_fields_set:
                self.override(job, terms)

    # Quotas

    def shortage(self, job: str, num_tokens: int) -> Shortage | None:
        """Which of its quotas keeps the job from starting a request now."""
        terms, book = self.terms(job), self.book(job)
        limit = terms.max_tokens_in_flight
        if limit is not None and book.tokens_in_flight and book.tokens_in_flight + num_tokens > limit:
            return Shortage.TOKENS_IN_FLIGHT
        if self.seconds_until_allowed(job, 1):
            return Shortage.REQUESTS_PER_S
        return None

    def seconds_until_allowed(self, job: str, count: int) -> float:
        """How long until the job may have started so many requests more; 0: now."""
        rate = self.terms(job).max_requests_per_s
        if rate is None:
            return 0.0
        return self.book(job).bucket.seconds_until(count, rate=rate, now_s=self._clock())

    # Books

    def book(self, job: str) -> JobBook:
        """The job's book; a new one when there is none."""
        found = self._books.get(job)
        if found is None:
            if len(self._books) >= _MAX_BOOKS:
                self._forget_some()
            now_s = self._clock()
            found = JobBook(bucket=TokenBucket(now_s), tokens_rate=DecayingRate(now_s), heard_s=now_s)
            self._books[job] = found
        return found

    def books(self) -> Mapping[str, JobBook]:
        """Of every job that is known."""
        return self._books

    def started(self, job: str, num_tokens: int, *, waited_s: float) -> None:
        """A request of the job has started."""
        book = self._hear(job)
        book.tokens_in_flight += num_tokens
        book.waits_s.append(waited_s)
        rate = self.terms(job).max_requests_per_s
        if rate is not None:
            book.bucket.take(rate=rate, now_s=self._clock())

    def waits_again(self, job: str) -> None:
        """A request that had started is to start once more: it has paid."""
        self._hear(job).bucket.give_back()

    def ended(self, job: str, num_tokens: int) -> None:
        """The engine works on it no longer."""
        self._hear(job).tokens_in_flight -= num_tokens

    def computed(self, job: str, num_tokens: int) -> None:
        """The job got so many tokens' worth of the engine."""
        book = self._hear(job)
        book.tokens += num_tokens
        book.tokens_rate.add(num_tokens, self._clock())

    def refused(self, job: str, shortage: Shortage) -> None:
        """A request of the job was refused."""
        self._hear(job).refusals[shortage] += 1

    def abandoned(self, job: str, num_slots: int) -> None:
        """So many slots went out of service under a client of the job."""
        if num_slots:
            self._hear(job).abandoned_slots += num_slots

    def tokens_per_s(self, job: str) -> float:
        """What the job got of the engine lately."""
        book = self._books.get(job)
        return 0.0 if book is None else book.tokens_rate.per_s(self._clock())

    def forget_silent(self, present: Set[str]) -> None:
        """Close the books of jobs that have left: they did nothing for so long, and are not among those `present`."""
        limit_s = self._clock() - FORGET_S
        gone = [
            job
            for job, book in self._books.items()
            if book.heard_s <= limit_s and not book.tokens_in_flight and job not in present
        ]
        for job in gone:
            del self._books[job]

    def _forget_some(self) -> None:
        """Close the books that were silent for longest, where there is room for no more."""
        idle = [job for job, book in self._books.items() if not book.tokens_in_flight]
        for job in sorted(idle, key=lambda job: self._books[job].heard_s)[: _MAX_BOOKS // 8]:
            del self._books[job]

    def _hear(self, job: str) -> JobBook:
        book = self.book(job)
        book.heard_s = self._clock()
        return book


def check_name(job: str) -> None:
    """Raises InvalidRequest when a job cannot be called that."""
    if problem := job_names.problem_of(job):
        raise InvalidRequest(problem)


def _standing(terms: JobTerms) -> Standing:
    return Standing(weight=terms.weight, rank=_RANKS[terms.priority])
