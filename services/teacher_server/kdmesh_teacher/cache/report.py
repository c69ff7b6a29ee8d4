"""What the cache tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TierState:
    """One place where rows are kept."""

    budget_bytes: int
    used_bytes: int
    entries: int  # sequences
    evicted: int  # since the start


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """The cache at one moment; counts are since the start."""

    memory: TierState | None  # None: there is no budget for it
    directory: TierState | None
    corrupt: int  # entries that were not what they should have been, and were deleted
    skipped: int  # entries that were not written, because the disk was full, failed or was too slow
    refusal: str  # why nothing is written to the directory now; empty: it is

    @property
    def budget_bytes(self) -> int:
        """The largest budget: what is asked for once stays if all of it fits."""
        return max((tier.budget_bytes for tier in (self.memory, self.directory) if tier is not None), default=0)
