"""Requests that wait, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

S = TypeVar("S")


class Waiting(Protocol):
    """Work that waits; told apart by identity."""

    @property
    def session(self) -> bytes:
        """Whose it is."""
        ...

    @property
    def num_tokens(self) -> int:
        """What it costs."""
        ...


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """First in, first out within a session; sessions take turns, one request each.

    What is fair is decided here alone.
    """

    def __init__(self) -> None:
        # Sessions in the order of their turns; each one's requests in order of arrival.
        self._waiting: dict[bytes, dict[W, None]] = {}
        self.num_tokens = 0
        self.num_requests = 0

    def __contains__(self, work: W) -> bool:
        return work in self._waiting.get(work.session, {})

    def push(self, work: W) -> None:
        """Add a request behind its session's others."""
        self._waiting.setdefault(work.session, {})[work] = None
        self.num_tokens += work.num_tokens
        self.num_requests += 1

    def remove(self, work: W) -> None:
        """Take out a request that waits."""
        session = self._waiting[work.session]
        del session[work]
        if not session:
            del self._waiting[work.session]
        self.num_tokens -= work.num_tokens
        self.num_requests -= 1

    def of_session(self, session: bytes) -> Sequence[W]:
        """Its requests in order."""
        return tuple(self._waiting.get(session, ()))

    def everything(self) -> Sequence[W]:
        """Every request that waits."""
        return tuple(work for session in self._waiting.values() for work in session)

    def take(self, max_tokens: float, acquire: Callable[[bytes], S | None]) -> list[tuple[W, S]]:
        """The next batch, with what `acquire` gave for each request; empty when nothing can start now.

        A session whose next request does not fit, or for which `acquire` gives None, is passed over and
        keeps its place: it is first when there is room again, so nothing waits for ever.
        """
        batch: list[tuple[W, S]] = []
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

    def _next(self, passed_over: set[bytes]) -> W | None:
        session = next((s for s in self._waiting if s not in passed_over), None)
        return None if session is None else next(iter(self._waiting[session]))
