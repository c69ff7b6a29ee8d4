"""How evenly requests were spread over servers."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection


class SentTokens:
    """Tokens sent to each server in the last `window_s`. Times are of any one clock."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._sent: deque[tuple[float, str, int]] = deque()
        self._tokens: dict[str, int] = {}

    def add(self, name: str, num_tokens: int, now_s: float) -> None:
        """A request was sent."""
        self._sent.append((now_s, name, num_tokens))
        self._tokens[name] = self._tokens.get(name, 0) + num_tokens
        self._forget(now_s)

    def imbalance(self, names: Collection[str], now_s: float) -> float | None:
        """The most that one of `names` got, over their mean: 1 is even. None for fewer than two, or before anything."""
        self._forget(now_s)
        tokens = [self._tokens.get(name, 0) for name in names]
        if len(tokens) < 2 or not sum(tokens):
            return None
        return max(tokens) * len(tokens) / sum(tokens)

    def _forget(self, now_s: float) -> None:
        while self._sent and self._sent[0][0] <= now_s - self._window_s:
            _, name, num_tokens = self._sent.popleft()
            self._tokens[name] -= num_tokens
            if not self._tokens[name]:
                del self._tokens[name]
