"""How often to try again: a frozen policy whose retries end by deadline, never by count."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from kdmesh.errors import DeadlineExpired, Unavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of the monotonic clock."""

    at_s: float
    total_s: float  # for messages

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The moment `seconds` from now."""
        return cls(time.monotonic() + seconds, seconds)

    @property
    def left_s(self) -> float:
        """Time that is left; 0 when it has passed."""
        return max(0.0, self.at_s - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with jitter."""

    first_s: float = 0.1
    longest_s: float = 2.0
    factor: float = 2.0
    jitter: float = 0.25  # each wait is longer by up to this fraction, so that clients do not return together

    def wait_s(self, attempt: int, *, at_least_s: float = 0.0) -> float:
        """Before the attempt after number `attempt` (from 0); never shorter than what the server asked for."""
        backoff = min(self.longest_s, self.first_s * self.factor ** min(attempt, 32))
        return max(backoff, at_least_s) * (1 + random.random() * self.jitter)

    async def run(self, call: Callable[[Deadline], Awaitable[T]], deadline: Deadline) -> T:
        """Await call(deadline) until it does not raise Unavailable.

        Raises:
            DeadlineExpired: with the last failure's sentence, when the time is up.
        """
        attempt = 0
        while True:
            try:
                return await call(deadline)
            except Unavailable as error:
                wait_s = self.wait_s(attempt, at_least_s=error.retry_after_s)
                if wait_s >= deadline.left_s:
                    raise DeadlineExpired(
                        f"gave up after {attempt + 1} attempts in {deadline.total_s:g} s; the last: {error}"
                    ) from error
            attempt += 1
            await asyncio.sleep(wait_s)
