"""Requests that wait, and whose turn it is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

S = TypeVar("S")

# Credit of a job of weight 1 in one turn. Small, so that a job's small request waits for little of the others' large.
QUANTUM_TOKENS = 256


class Waiting(Protocol):
    """Work that waits; told apart by identity."""

    @property
    def job(self) -> str:
        """Whose share it is taken from."""
        ...

    @property
    def session(self) -> bytes:
        """Which of the job's clients asked for it."""
        ...

    @property
    def num_tokens(self) -> int:
        """What it costs."""
        ...


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a job stands to the others."""

    weight: float = 1.0  # its share is weight / (weights of the jobs that wait in its class)
    rank: int = 0  # of its priority class: while a lower one can start anything, a higher one gets what it leaves


@dataclass(slots=True, eq=False)
class _Job(Generic[W]):
    sessions: dict[bytes, dict[W, None]] = field(default_factory=dict)  # in order of turns; requests by arrival
    num_tokens: int = 0
    deficit: float = 0.0  # tokens that it may still be given in this turn
    round: int = -1  # in which it was given its newest credit
    has_turn: bool = False  # it was given its credit, and has not used it up


class FairQueue(Generic[W]):
    """Deficit round robin over tokens between jobs; the sessions of a job take turns, one request each.

    What is fair is decided here alone. A job in turn is given a credit of quantum x weight and is served while what
    is next costs no more; then the next job has its turn. So while jobs of a class wait, the tokens that each was
    given, divided by its weight, differ by no more than one quantum and the largest request. The end of a batch that
    is too small for what the jobs in turn ask next is given to whoever can use it, beyond its share.

    Args:
        standing: of a job, by its name; asked anew each time, so that it may change.
        quantum_tokens: credit of one turn for a weight of 1.
    """

    def __init__(
        self, standing: Callable[[str], Standing] = lambda job: Standing(), *, quantum_tokens: float = QUANTUM_TOKENS
    ) -> None:
        self._standing = standing
        self._quantum_tokens = quantum_tokens
        self._jobs: dict[str, _Job[W]] = {}  # those that wait, in the order of their turns
        self._round: dict[int, int] = {}  # by rank: the newest that any job was given credit in
        self.num_tokens = 0
        self.num_requests = 0

    def __contains__(self, work: W) -> bool:
        job = self._jobs.get(work.job)
        return job is not None and work in job.sessions.get(work.session, {})

    def push(self, work: W) -> None:
        """Add a request behind its session's others."""
        job = self._jobs.setdefault(work.job, _Job())
        job.sessions.setdefault(work.session, {})[work] = None
        job.num_tokens += work.num_tokens
        self.num_tokens += work.num_tokens
        self.num_requests += 1

    def remove(self, work: W) -> None:
        """Take out a request that waits."""
        job = self._jobs[work.job]
        session = job.sessions[work.session]
        del session[work]
        if not session:
            del job.sessions[work.session]
        if not job.sessions:
            del self._jobs[work.job]
        job.num_tokens -= work.num_tokens
        self.num_tokens -= work.num_tokens
        self.num_requests -= 1

    # Looking

    def jobs(self) -> Sequence[str]:
        """The jobs that wait, in the order of their turns."""
        return tuple(self._jobs)

    def of_job(self, job: str) -> Iterator[W]:
        """Its requests in the order in which they will start, listed only as far as they are asked for."""
        waiting = self._jobs.get(job)
        queues = deque(map(iter, waiting.sessions.values()) if waiting is not None else ())
        while queues:
            session = queues.popleft()
            if (work := next(session, None)) is not None:
                yield work
                queues.append(session)

    def of_session(self, job: str, session: bytes) -> Sequence[W]:
        """Its requests in order."""
        waiting = self._jobs.get(job)
        return () if waiting is None else tuple(waiting.sessions.get(session, ()))

    def everything(self) -> Sequence[W]:
        """Every request that waits."""
        return tuple(work for job in self._jobs.values() for session in job.sessions.values() for work in session)

    def tokens_of(self, job: str) -> int:
        """Tokens of its requests that wait."""
        waiting = self._jobs.get(job)
        return 0 if waiting is None else waiting.num_tokens

    def requests_of(self, job: str) -> int:
        """How many of its requests wait."""
        waiting = self._jobs.get(job)
        return 0 if waiting is None else sum(map(len, waiting.sessions.values()))

    def share(self, job: str) -> float:
        """Its weight among those of the jobs that wait, of all classes, and its own."""
        own = self._standing(job).weight
        return own / (own + sum(self._standing(name).weight for name in self._jobs if name != job))

    def tokens_until(self, job: str, own_tokens: float) -> float:
        """Tokens that are computed until so many of the job's own are, when nothing else joins the queue."""
        own = self._standing(job)
        total = own_tokens
        for name, waiting in self._jobs.items():
            other = self._standing(name)
            if other.rank < own.rank:
                total += waiting.num_tokens
            elif other.rank == own.rank and name != job:
                total += min(waiting.num_tokens, own_tokens * other.weight / own.weight)
        return total

    # Taking

    def take(
        self, max_tokens: float, can_start: Callable[[W], bool], start: Callable[[W], S | None]
    ) -> list[tuple[W, S]]:
        """The next batch, with what `start` gave for each request; empty when nothing can start now.

        What cannot start, or is larger than the rest of the batch, is passed over and keeps its place: others use the
        room, and it is first when it can start. Lower classes get the room that higher ones cannot use.

        Args:
            max_tokens: of the batch.
            can_start: whether there is all that a request needs but credit; must change nothing.
            start: takes what it needs; None when that failed all the same.
        """
        ranks = {name: self._standing(name).rank for name in self._jobs}
        batch: list[tuple[W, S]] = []
        for rank in sorted(set(ranks.values())):
            names = [name for name, other in ranks.items() if other == rank]
            taking = _Taking(self, names, self._round.get(rank, 0), max_tokens, can_start, start)
            batch += taking.run()
            max_tokens, self._round[rank] = taking.room, taking.round
        return batch


class _Taking(Generic[W, S]):
    """One class's part of a batch."""

    def __init__(
        self,
        queue: FairQueue[W],
        names: Sequence[str],
        began_round: int,
        room: float,
        can_start: Callable[[W], bool],
        start: Callable[[W], S | None],
    ) -> None:
        self.room = room
        self.round = began_round
        self._max_tokens = room
        self._queue = queue
        self._can_start = can_start
        self._start = start
        self._batch: list[tuple[W, S]] = []
        self._names = names
        self._quanta = {name: queue._quantum_tokens * queue._standing(name).weight for name in names}
        for name in names:  # whoever could not start anything, for reasons of its own, saves no credit
            job = queue._jobs[name]
            job.round = min(max(job.round, began_round - 1), began_round)
        # Sessions that may still start something in this batch: room and slots only become fewer.
        self._sessions = {name: deque(queue._jobs[name].sessions) for name in names}
        self._has_no_room: set[str] = set()  # jobs with a session whose next request is larger than the room

    def run(self) -> list[tuple[W, S]]:
        """Give turns until nothing can start."""
        jobs = self._queue._jobs
        turns = list(self._names)
        while turns:
            num_before = len(self._batch)
            again = []
            for name in turns:
                if self._give_turn(name):
                    jobs[name].has_turn = False
                    jobs[name] = jobs.pop(name)
                    again.append(name)
            turns = again
            if turns and len(self._batch) == num_before:
                self._skip_rounds(turns)
        self._make_up()
        return self._batch

    def _give_turn(self, name: str) -> bool:
        """Start what the job can; True when it stopped because its credit is used up, so that it goes to the end."""
        job = self._queue._jobs[name]
        while (work := self._next(name, job)) is not None:
            if not job.has_turn:
                job.has_turn = True
                self._credit(name, job, 1)
            if work.num_tokens > job.deficit:
                return True
            started = self._start(work)
            if started is None:
                self._sessions[name].popleft()
                continue
            self._batch.append((work, started))
            self._served(name, job, work)
        return False

    def _next(self, name: str, job: _Job[W]) -> W | None:
        """What the job would start now; None when it can start nothing in this batch."""
        sessions = self._sessions[name]
        while sessions:
            work = next(iter(job.sessions[sessions[0]]))
            if work.num_tokens > self.room:
                self._has_no_room.add(name)
            elif self._can_start(work):
                return work
            sessions.popleft()
        return None

    def _served(self, name: str, job: _Job[W], work: W) -> None:
        self._queue.remove(work)
        job.deficit -= work.num_tokens
        self.room -= work.num_tokens
        sessions = self._sessions[name]
        sessions.popleft()
        if work.session in job.sessions:  # to the end of the job's turns
            job.sessions[work.session] = job.sessions.pop(work.session)
            sessions.append(work.session)

    def _credit(self, name: str, job: _Job[W], rounds: int) -> None:
        job.deficit += rounds * self._quanta[name]
        job.round += rounds
        self.round = max(self.round, job.round)

    def _skip_rounds(self, turns: Sequence[str]) -> None:
        """Nobody's credit sufficed: give at once as many rounds as the first to start something will need."""
        jobs = self._queue._jobs
        needed = {}
        for name in turns:
            work = self._next(name, jobs[name])
            if work is not None:
                needed[name] = math.ceil((work.num_tokens - jobs[name].deficit) / self._quanta[name])
        rounds = min(needed.values(), default=1) - 1  # the last one is given in the turn
        for name in needed:
            self._credit(name, jobs[name], rounds)

    def _make_up(self) -> None:
        """Whoever only lacked room in the batch must not lose the rounds that others had meanwhile, up to a batch."""
        for name in self._has_no_room:
            job = self._queue._jobs.get(name)
            if job is not None and job.round < self.round - 1:
                missed = (self.round - 1 - job.round) * self._quanta[name]
                job.round = self.round - 1
                job.deficit = max(job.deficit, min(job.deficit + missed, self._max_tokens + self._quanta[name]))
