"""How fast the engine gets through the queue, for telling callers how long to wait."""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest batch


class Throughput:
    """A moving average of tokens per second of batches."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a finished batch."""
        self._tokens += _WEIGHT * (tokens - self._tokens)
        self._seconds += _WEIGHT * (max(seconds, 1e-6) - self._seconds)

    @property
    def tokens_per_s(self) -> float | None:
        """None before the first batch."""
        return self._tokens / self._seconds if self._seconds else None

    def seconds_for(self, tokens: int) -> float:
        """How long `tokens` take, between 10 ms and 5 minutes; a second when nothing was measured."""
        rate = self.tokens_per_s
        return 1.0 if rate is None else min(max(tokens / max(rate, 1e-6), 0.01), 300.0)
