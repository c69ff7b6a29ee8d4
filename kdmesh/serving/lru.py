"""Which entries a budget holds, and which of them go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class LeastRecentlyUsed(Generic[V]):
    """Entries of known size, together at most `budget_bytes`; the one not used for longest goes first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.evicted = 0
        self._entries: OrderedDict[bytes, tuple[V, int]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[bytes]:
        """Keys, the first to go first."""
        return iter(self._entries)

    def use(self, key: bytes) -> V | None:
        """The entry, which is now the last to go; None when there is none."""
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def add(self, key: bytes, value: V, size_bytes: int) -> list[bytes] | None:
        """Put an entry in; the keys of those that had to go, or None when it is larger than the budget by itself."""
        self.discard(key)
        if size_bytes > self.budget_bytes:
            return None
        gone = []
        while self.used_bytes + size_bytes > self.budget_bytes:
            gone.append(next(iter(self._entries)))
            self.discard(gone[-1])
        self.evicted += len(gone)
        self._entries[key] = value, size_bytes
        self.used_bytes += size_bytes
        return gone

    def discard(self, key: bytes) -> None:
        """Take an entry out, if it is there."""
        found = self._entries.pop(key, None)
        if found is not None:
            self.used_bytes -= found[1]
