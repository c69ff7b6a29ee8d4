"""How much a server did lately."""

from __future__ import annotations

import math

_FADES_S = 60.0


class RecentTokens:
    """Tokens, each of which counts the less the longer ago it was. Times are of any one clock."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._at_s = 0.0

    def add(self, num_tokens: int, now_s: float) -> None:
        """So many more."""
        self._tokens = self.at(now_s) + num_tokens
        self._at_s = now_s

    def at(self, now_s: float) -> float:
        """How many count now: after a minute about a third of those that came together."""
        return self._tokens * math.exp((self._at_s - now_s) / _FADES_S)
