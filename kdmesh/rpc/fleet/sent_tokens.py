"""How evenly requests were spread over servers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection


class SentTokens:
    """Tokens sent to each server in the last `window_s` whole seconds. Times are of any one clock."""

    def __init__(self, window_s: int) -> None:
        self._window_s = window_s
        self._seconds: deque[tuple[int, Counter[str]]] = deque()  # few, however many requests there are

    def add(self, name: str, num_tokens: int, now_s: float) -> None:
        """A request was sent."""
        second = int(now_s)
        if not self._seconds or self._seconds[-1][0] != second:
            self._forget(now_s)
            self._seconds.append((second, Counter()))
        self._seconds[-1][1][name] += num_tokens

    def imbalance(self, names: Collection[str], now_s: float) -> float | None:
        """The most that one of `names` got, over their mean: 1 is even. None for fewer than two, or before anything."""
        self._forget(now_s)
        tokens = [sum(of_second[name] for _, of_second in self._seconds) for name in names]
        if len(tokens) < 2 or not sum(tokens):
            return None
        return max(tokens) * len(tokens) / sum(tokens)

    def _forget(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] <= now_s - self._window_s:
            self._seconds.popleft()
