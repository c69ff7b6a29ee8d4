"""How often something may happen, and how often it did."""

from __future__ import annotations

import math

_RATE_MEMORY_S = 10.0


class TokenBucket:
    """Lets `rate` things happen in a second, after a burst of one second's; the rate may change at any time."""

    def __init__(self, now_s: float) -> None:
        self._level: float | None = None  # None: full, whatever the rate
        self._at_s = now_s

    def seconds_until(self, count: int, *, rate: float, now_s: float) -> float:
        """How long until so many may happen, one after the other; 0: now."""
        return max(0.0, (count - self._refilled(rate, now_s)) / rate)

    def take(self, *, rate: float, now_s: float) -> None:
        """One happens."""
        self._level = self._refilled(rate, now_s) - 1
        self._at_s = now_s

    def give_back(self) -> None:
        """One that was taken did not happen."""
        if self._level is not None:
            self._level += 1

    def _refilled(self, rate: float, now_s: float) -> float:
        burst = max(1.0, rate)
        return burst if self._level is None else min(burst, self._level + (now_s - self._at_s) * rate)


class DecayingSum:
    """How much of something there was lately: what is older than `memory_s` counts less than 1 / e."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._amount = 0.0
        self._at_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        """So much, now."""
        self._amount = self.at(now_s) + amount
        self._at_s = now_s

    def at(self, now_s: float) -> float:
        """How much counts now."""
        return self._amount * math.exp((self._at_s - now_s) / self._memory_s)


class DecayingRate:
    """How much of something there was per second lately: what is older counts less."""

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._sum = DecayingSum(_RATE_MEMORY_S)

    def add(self, amount: float, now_s: float) -> None:
        """So much, now."""
        self._sum.add(amount, now_s)

    def per_s(self, now_s: float) -> float:
        """Over the last seconds, or since the beginning where that is less."""
        seen = 1 - math.exp(-max(now_s - self._began_s, 1.0) / _RATE_MEMORY_S)
        return self._sum.at(now_s) / (_RATE_MEMORY_S * seen)
