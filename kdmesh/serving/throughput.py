"""How fast the engine gets through the queue, for telling callers how long to wait."""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest batch


class Throughput:
    """A moving average of tokens per second of batches."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._weights = 0.0  # of the batches so far; 1 after many
        self._uncounted_s = 0.0  # since the last tokens

    def add(self, tokens: int, seconds: float) -> None:
        """Count a finished batch; one without tokens is part of the next, for engines that count them at the end."""
        self._uncounted_s += max(seconds, 1e-6)
        if tokens == 0:
            return
        self._tokens += _WEIGHT * (tokens - self._tokens)
        self._seconds += _WEIGHT * (self._uncounted_s - self._seconds)
        self._weights += _WEIGHT * (1 - self._weights)
        self._uncounted_s = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None before the first batch."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def seconds_per_batch(self) -> float | None:
        """None before the first batch."""
        return self._seconds / self._weights if self._weights else None
