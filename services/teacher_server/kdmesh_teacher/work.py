"""One request on its way through a teacher server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from kdmesh.types import Handle, TokenSequence


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
    weight_version: int  # of the weights that must make the rows; 0: any
    num_tokens: int
    num_rows: int
    arrived_s: float
    answer: asyncio.Future[Answer]
