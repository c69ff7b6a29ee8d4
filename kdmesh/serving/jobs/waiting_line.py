"""Requests that wait for an engine: who is let in, who starts next, and how long that takes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from kdmesh.errors import Unavailable
from kdmesh.serving.jobs.fair_queue import QUANTUM_TOKENS, FairQueue, Waiting
from kdmesh.serving.jobs.table import JobTable, Shortage
from kdmesh.serving.rate import DecayingSum
from kdmesh.serving.throughput import Throughput
from kdmesh.types import ServerLoad

S = TypeVar("S")

_UNMEASURED_S = 1.0  # what a caller is told to wait before the first batch
_SHORTEST_S, _LONGEST_S = 0.01, 300.0
RECENT_S = 60.0
"""What the engine was given counts as recent, the less the longer ago: see DecayingSum."""


class Request(Waiting, Protocol):
    """A request that waits, and since when."""

    @property
    def arrived_s(self) -> float:
        """By the line's clock."""
        ...


W = TypeVar("W", bound=Request)


class WaitingLine(Generic[W]):
    """A fair queue between jobs with quotas.

    Args:
        jobs: what each may take.
        max_tokens: that may wait, over all jobs. When so many do, a job is refused that has its share of them: its
            weight among the jobs that wait. One with nothing in the queue is always let in with one call.
        batch_tokens: most tokens of a batch; jobs take turns within one.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        jobs: JobTable[Any],
        *,
        max_tokens: int,
        batch_tokens: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.jobs = jobs
        self.queue = FairQueue[W](jobs.standing, quantum_tokens=min(QUANTUM_TOKENS, batch_tokens / 8))
        self.throughput = Throughput()
        self._recent = DecayingSum(RECENT_S)
        self._max_tokens = max_tokens
        self._clock = clock
        self._under_way: tuple[float, int] | None = None  # when the batch began, its tokens
        self._allowed_s = math.inf  # when a job's rate lets it start what the newest `take` passed over

    def join(self, works: Sequence[W]) -> None:
        """Let requests of one job in, all or none. Raises Unavailable when the queue is full."""
        self.jobs.look_again()
        job, wanted = works[0].job, sum(work.num_tokens for work in works)
        waiting, own = self.queue.num_tokens, self.queue.tokens_of(job)
        share = self._max_tokens * self.queue.share(job)
        excess = min(waiting + wanted - self._max_tokens, own + wanted - share)
        if own and excess > 0:
            self.jobs.refused(job, Shortage.QUEUE_FULL)
            raise Unavailable(
                f"the queue is full: {waiting} tokens wait, this request has {wanted}, and at most {self._max_tokens} "
                f"may wait, {share:.0f} of them of job {job!r}",
                retry_after_s=self._seconds_until_gone(job, min(excess, own)),
            )
        for work in works:
            self.queue.push(work)

    def take(
        self, max_tokens: float, can_start: Callable[[W], bool], start: Callable[[W], S | None]
    ) -> list[tuple[W, S]]:
        """The next batch; see FairQueue.take. What a quota forbids is not asked for."""
        self.jobs.look_again()
        self._allowed_s = math.inf

        def is_allowed(work: W) -> bool:
            shortage = self.jobs.shortage(work.job, work.num_tokens)
            if shortage is Shortage.REQUESTS_PER_S:
                allowed_s = self._clock() + self.jobs.seconds_until_allowed(work.job, 1)
                self._allowed_s = min(self._allowed_s, allowed_s)
            return shortage is None and can_start(work)

        def note(work: W) -> S | None:
            started = start(work)
            if started is not None:
                self.jobs.started(work.job, work.num_tokens, waited_s=self._clock() - work.arrived_s)
            return started

        return self.queue.take(max_tokens, is_allowed, note)

    def batch_began(self, num_tokens: int) -> None:
        """The engine works on a batch, and on nothing else until `computed`."""
        self._under_way = self._clock(), num_tokens
        self._recent.add(num_tokens, self._clock())

    @property
    def load(self) -> ServerLoad:
        """What is to be done, how fast that goes, and what was done lately."""
        return ServerLoad(
            waiting_tokens=self.queue.num_tokens + (0 if self._under_way is None else self._under_way[1]),
            tokens_per_s=self.throughput.tokens_per_s,
            recent_tokens=self._recent.at(self._clock()),
        )

    def computed(self, num_tokens: int, seconds: float) -> None:
        """The engine was so fast."""
        self._under_way = None
        self.throughput.add(num_tokens, seconds)

    def seconds_until_start(self, job: str, num_tokens: int) -> float:
        """How long a request of the job would wait that came now, if the others ask for as much as they do now."""
        own = self.queue.tokens_of(job)
        tokens = self.queue.tokens_until(job, own + num_tokens) - num_tokens
        return self._bounded(job, tokens, own, self.queue.requests_of(job) + 1)

    async def until_woken(self, wake: asyncio.Event) -> None:
        """Wait for something new, or until a job's rate lets it start what `take` passed over; then `wake` is set."""

        def allowed() -> None:
            self._allowed_s = math.inf  # once: nobody need take again
            wake.set()

        # It was noted when it was found: asked anew, a rate that lets the job start by now would say no time at all.
        wait_s = self._allowed_s - self._clock()
        timer = None if wait_s == math.inf else asyncio.get_running_loop().call_later(wait_s, allowed)
        try:
            await wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _seconds_until_gone(self, job: str, own_tokens: float) -> float:
        """How long until so many tokens of the job have left the queue."""
        num_requests, tokens = 0, 0
        for work in self.queue.of_job(job):
            if tokens >= own_tokens:
                break
            tokens += work.num_tokens
            num_requests += 1
        return self._bounded(job, self.queue.tokens_until(job, own_tokens), own_tokens, num_requests)

    def _bounded(self, job: str, tokens: float, own_tokens: float, own_requests: int) -> float:
        """How long so many tokens of the queue take, and the job's own under its quotas."""
        rate, batch_s = self.throughput.tokens_per_s, self.throughput.seconds_per_batch
        seconds = self.jobs.seconds_until_allowed(job, own_requests)
        if rate is None or batch_s is None:
            seconds = max(seconds, _UNMEASURED_S)
        else:
            seconds = max(seconds, tokens / rate + self._under_way_s(rate))
            limit = self.jobs.terms(job).max_tokens_in_flight
            if limit is not None:
                seconds = max(seconds, own_tokens / limit * batch_s)
        return min(max(seconds, _SHORTEST_S), _LONGEST_S)

    def _under_way_s(self, rate: float) -> float:
        """How long the batch that is computed still takes."""
        if self._under_way is None:
            return 0.0
        began_s, num_tokens = self._under_way
        return max(0.0, num_tokens / rate - (self._clock() - began_s))
