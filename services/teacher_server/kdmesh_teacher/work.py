"""One request on its way through a teacher server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress, groupby

from kdmesh.handles.slab.store import SlotLease
from kdmesh.types import Handle, TokenSequence
from kdmesh_teacher.cache.row_cache import Found
from kdmesh_teacher.engine import PrefillJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The rows of one request, and how they came to be."""

    rows: Handle
    digest: bytes  # 16 bytes, of the sequences that the engine was given
    weight_version: int  # of the weights that made them
    queue_s: float  # from arrival to the start of the prefill
    engine_s: float  # of the whole batch


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """One admitted request."""

    session: bytes
    job: str
    sequences: tuple[TokenSequence, ...]
    layers: tuple[int, ...] = ()  # whose outputs are a part of every row
    weight_version: int  # of the weights that must make the rows; 0: any
    found: Found | None  # in the cache, so far; None: it is not asked, and told nothing
    arrived_s: float
    answer: asyncio.Future[Answer]
    num_tokens: int = field(init=False)  # that had to be computed when it came, which is what it costs
    num_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.num_tokens_to_compute()
        self.num_rows = sum(sequence.num_rows for sequence in self.sequences)

    def to_compute(self) -> Iterator[TokenSequence]:
        """The sequences whose rows the cache did not have."""
        missing = (True,) * len(self.sequences) if self.found is None else (not kept for kept in self.found.is_kept)
        return compress(self.sequences, missing)

    def num_tokens_to_compute(self) -> int:
        """Of those."""
        return sum(sequence.num_tokens for sequence in self.to_compute())

    def prefill_jobs(self, lease: SlotLease, *, row_bytes: int) -> Iterator[PrefillJob]:
        """What the engine must write to the slot: a job for each run of sequences without a kept one in between."""
        is_kept = (False,) * len(self.sequences) if self.found is None else self.found.is_kept
        offset_bytes = 0
        for kept, run in groupby(zip(self.sequences, is_kept, strict=True), key=lambda pair: pair[1]):
            sequences = tuple(sequence for sequence, _ in run)
            size_bytes = sum(sequence.num_rows for sequence in sequences) * row_bytes
            if not kept:
                yield PrefillJob(
                    sequences=sequences,
                    layers=self.layers,
                    out=lease.buffer[offset_bytes : offset_bytes + size_bytes],
                    segment=lease.segment,
                    offset_bytes=offset_bytes,
                )
            offset_bytes += size_bytes
