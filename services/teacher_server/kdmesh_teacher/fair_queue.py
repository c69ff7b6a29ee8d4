"""Requests that wait, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kdmesh.types import Handle, TokenSequence

S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The rows of one request, and how they came to be."""

    rows: Handle
    digest: bytes  # 16 bytes, of the sequences that the engine was given
    queue_s: float  # from arrival to the start of the prefill
    engine_s: float  # of the whole batch


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """One admitted request."""

    session: bytes
    job: str
    sequences: tuple[TokenSequence, ...]
    num_tokens: int
    num_rows: int
    arrived_s: float
    answer: asyncio.Future[Answer]


class FairQueue:
    """First in, first out within a session; sessions take turns, one request each.

    What is fair is decided here alone.
    """

    def __init__(self) -> None:
        # Sessions in the order of their turns; each one's requests in order of arrival.
        self._waiting: dict[bytes, dict[Work, None]] = {}
        self.num_tokens = 0
        self.num_requests = 0

    def __contains__(self, work: Work) -> bool:
        return work in self._waiting.get(work.session, {})

    def push(self, work: Work) -> None:
        """Add a request behind its session's others."""
        self._waiting.setdefault(work.session, {})[work] = None
        self.num_tokens += work.num_tokens
        self.num_requests += 1

    def remove(self, work: Work) -> None:
        """Take out a request that waits."""
        session = self._waiting[work.session]
        del session[work]
        if not session:
            del self._waiting[work.session]
        self.num_tokens -= work.num_tokens
        self.num_requests -= 1

    def of_session(self, session: bytes) -> Sequence[Work]:
        """Its requests in order."""
        return tuple(self._waiting.get(session, ()))

    def everything(self) -> Sequence[Work]:
        """Every request that waits."""
        return tuple(work for session in self._waiting.values() for work in session)

    def take(self, max_tokens: int, acquire: Callable[[bytes], S | None]) -> list[tuple[Work, S]]:
        """The next batch, with what `acquire` gave for each request; empty when nothing can start now.

        A session whose next request does not fit, or for which `acquire` gives None, is passed over and
        keeps its place: it is first when there is room again, so nothing waits for ever.
        """
        batch: list[tuple[Work, S]] = []
        passed_over: set[bytes] = set()
        while (work := self._next(passed_over)) is not None:
            slot = acquire(work.session) if work.num_tokens <= max_tokens else None
            if slot is None:
                passed_over.add(work.session)
                continue
            self.remove(work)
            max_tokens -= work.num_tokens
            batch.append((work, slot))
            if work.session in self._waiting:  # to the end of the turns
                self._waiting[work.session] = self._waiting.pop(work.session)
        return batch

    def _next(self, passed_over: set[bytes]) -> Work | None:
        session = next((s for s in self._waiting if s not in passed_over), None)
        return None if session is None else next(iter(self._waiting[session]))
