"""Rows in the memory of this process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdmesh.serving.lru import LeastRecentlyUsed
from kdmesh.weights import digests
from kdmesh_teacher.cache.report import TierState

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptRows:
    """A copy of one sequence's rows."""

    data: Bytes
    digest: bytes

    def write_to(self, out: memoryview) -> bool:
        """Copy to `out`; whether the bytes there are those that were kept. Runs without the interpreter lock."""
        if len(out) != len(self.data):
            return False
        np.copyto(np.frombuffer(out, np.uint8), self.data)
        return digests.digest(out) == self.digest


def copy_of(rows: memoryview) -> KeptRows:
    """A copy of its own, with the digest of what was copied. Runs without the interpreter lock."""
    digest = digests.digest(rows)
    return KeptRows(data=np.frombuffer(rows, np.uint8).copy(), digest=digest)


class MemoryTier:
    """At most `budget_bytes` of rows. Belongs to one event loop."""

    def __init__(self, budget_bytes: int) -> None:
        self._kept = LeastRecentlyUsed[KeptRows](budget_bytes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def get(self, key: bytes) -> KeptRows | None:
        """The rows, if they are here."""
        return self._kept.use(key)

    def put(self, key: bytes, rows: KeptRows) -> None:
        """Keep rows, in place of those that were not used for longest."""
        self._kept.add(key, rows, len(rows.data))

    def drop(self, key: bytes) -> None:
        """Keep these no more."""
        self._kept.discard(key)

    def state(self) -> TierState:
        """As it is now."""
        kept = self._kept
        return TierState(
            budget_bytes=kept.budget_bytes, used_bytes=kept.used_bytes, entries=len(kept), evicted=kept.evicted
        )
