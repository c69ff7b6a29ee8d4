"""When to try again: retries end by deadline, never by count, and each attempt gets the time that is left."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass


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
