"""What the benchmark `routing` simulates: teachers, training jobs, and a clock that only events move."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kdmesh.serving.jobs.waiting_line import RECENT_S
from kdmesh.serving.rate import DecayingSum
from kdmesh.serving.throughput import Throughput
from kdmesh.types import ServerLoad

ONE_WAY_S = 0.0005  # of a message between nodes
_STEP_END_S = 0.2  # reduction and optimizer


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` then; what is due at the same moment happens in the order it was asked for."""
        heapq.heappush(self._events, (self.now_s + seconds, next(self._order), act))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        self.now_s = until_s


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One micro-batch of one rank."""

    rank: Rank
    number: int
    tokens: int
    planned: int  # number of the teacher that a central plan gives it to
    began_s: float
    teacher: str = ""  # that it was sent to last


class Teacher:
    """Computes one request after the other, at its own speed."""

    def __init__(self, clock: Clock, name: str, tokens_per_s: float) -> None:
        self.name = name
        self.tokens_per_s = tokens_per_s
        self.is_there = True
        self.answers: list[tuple[float, int]] = []  # moment and tokens of each
        self._clock = clock
        self._queue: deque[Request] = deque()
        self._waiting_tokens = 0
        self._measured = Throughput()
        self._recent = DecayingSum(RECENT_S)
        self._lives = 0

    @property
    def load(self) -> ServerLoad:
        """As a server says it."""
        return ServerLoad(
            waiting_tokens=self._waiting_tokens,
            tokens_per_s=self._measured.tokens_per_s,
            recent_tokens=self._recent.at(self._clock.now_s),
        )

    def take(self, request: Request) -> None:
        """Queue it, or fail it."""
        if not self.is_there:
            self._clock.after(ONE_WAY_S, partial(request.rank.failed, request))
            return
        self._queue.append(request)
        self._waiting_tokens += request.tokens
        if len(self._queue) == 1:
            self._begin()

    def die(self) -> None:
        """With all that waits."""
        self.is_there = False
        self._lives += 1
        for request in self._queue:
            self._clock.after(ONE_WAY_S, partial(request.rank.failed, request))
        self._queue.clear()
        self._waiting_tokens = 0

    def come_back(self) -> None:
        """With nothing to do."""
        self.is_there = True

    def tokens(self, begin_s: float, end_s: float) -> int:
        """That it has answered in a time."""
        return sum(tokens for at_s, tokens in self.answers if begin_s < at_s <= end_s)

    def _begin(self) -> None:
        self._recent.add(self._queue[0].tokens, self._clock.now_s)
        seconds = self._queue[0].tokens / self.tokens_per_s
        self._clock.after(seconds, partial(self._finish, self._lives, seconds))

    def _finish(self, life: int, seconds: float) -> None:
        if life != self._lives:
            return
        request = self._queue.popleft()
        self._waiting_tokens -= request.tokens
        self.answers.append((self._clock.now_s, request.tokens))
        self._measured.add(request.tokens, seconds)
        self._clock.after(ONE_WAY_S, partial(request.rank.answered, request, self.load))
        if self._queue:
            self._begin()


class Choice(Protocol):
    """How one rank chooses."""

    def send(self, request: Request) -> None:
        """Bring it to a teacher."""
        ...

    def answered(self, request: Request, load: ServerLoad) -> None:
        """It was answered, and so was said how much the teacher has to do."""
        ...

    def failed(self, request: Request) -> None:
        """Its teacher died."""
        ...

    def lost(self, name: str) -> None:
        """The connection to a teacher is gone."""
        ...

    def found(self, name: str) -> None:
        """It is there again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What every rank asks for, and how fast it trains on it."""

    mean_tokens: float  # of a micro-batch
    sigma: float  # of the logarithm of its tokens
    micro_batches: int  # of a rank in a step
    prefetch: int
    train_tokens_per_s: float


class Job:
    """Ranks that end each step together. The plan of a step is known before it."""

    def __init__(self, clock: Clock, demand: Demand, *, ranks: int, teachers: int, seed: int) -> None:
        self.demand = demand
        self.ranks = [Rank(clock, self, index) for index in range(ranks)]
        self._clock = clock
        self._num_teachers = teachers
        self._rng = random.Random(seed)
        self._median = demand.mean_tokens / math.exp(demand.sigma**2 / 2)
        self._plans: list[list[list[tuple[int, int]]]] = []  # [step][rank][micro-batch]: tokens, teacher
        self._num_arrived = 0

    def begin(self) -> None:
        """Every rank asks for its first micro-batches."""
        for rank in self.ranks:
            rank.ask()

    def micro_batch(self, number: int, rank: int) -> tuple[int, int]:
        """Tokens of a rank's micro-batch, and the number of the teacher that it is planned for."""
        step, index = divmod(number, self.demand.micro_batches)
        while len(self._plans) <= step:
            self._plans.append(self._plan())
        return self._plans[step][rank][index]

    def arrive(self) -> None:
        """A rank is at the end of its step."""
        self._num_arrived += 1
        if self._num_arrived == len(self.ranks):
            self._num_arrived = 0
            self._clock.after(_STEP_END_S, self._next_step)

    def _next_step(self) -> None:
        for rank in self.ranks:
            rank.begin_step()

    def _plan(self) -> list[list[tuple[int, int]]]:
        """In order of arrival, each to the teacher with the fewest tokens of this step, as KDFlow's driver does."""
        loads = [(0, teacher) for teacher in range(self._num_teachers)]
        plan: list[list[tuple[int, int]]] = [[] for _ in self.ranks]
        for _ in range(self.demand.micro_batches):
            for planned in plan:
                tokens = min(max(round(self._median * self._rng.lognormvariate(0, self.demand.sigma)), 64), 32768)
                assigned, teacher = heapq.heappop(loads)
                heapq.heappush(loads, (assigned + tokens, teacher))
                planned.append((tokens, teacher))
        return plan


class Rank:
    """Asks ahead, trains in order."""

    choice: Choice

    def __init__(self, clock: Clock, job: Job, index: int) -> None:
        self.waits_s: list[float] = []  # for each answer, tries again included
        self._clock = clock
        self._job = job
        self._index = index
        self._num_asked = 0
        self._num_trained = 0
        self._there: set[int] = set()
        self._is_training = self._is_at_end = False

    def ask(self) -> None:
        """As far ahead as it may."""
        while self._num_asked <= self._num_trained + self._job.demand.prefetch:
            tokens, planned = self._job.micro_batch(self._num_asked, self._index)
            request = Request(
                rank=self, number=self._num_asked, tokens=tokens, planned=planned, began_s=self._clock.now_s
            )
            self._num_asked += 1
            self.choice.send(request)

    def begin_step(self) -> None:
        """Every rank of the job is at the end of its step."""
        self._is_at_end = False
        self._train()

    def answered(self, request: Request, load: ServerLoad) -> None:
        """Its rows have come."""
        self.waits_s.append(self._clock.now_s - request.began_s)
        self._there.add(request.number)
        self.choice.answered(request, load)
        self._train()

    def failed(self, request: Request) -> None:
        """Its teacher died."""
        self.choice.failed(request)
        self.choice.send(request)

    def _train(self) -> None:
        if self._is_training or self._is_at_end or self._num_trained not in self._there:
            return
        self._is_training = True
        self._there.remove(self._num_trained)
        tokens, _ = self._job.micro_batch(self._num_trained, self._index)
        self._clock.after(tokens / self._job.demand.train_tokens_per_s, self._trained)

    def _trained(self) -> None:
        self._is_training = False
        self._num_trained += 1
        self.ask()
        if self._num_trained % self._job.demand.micro_batches == 0:
            self._is_at_end = True
            self._job.arrive()
        else:
            self._train()
