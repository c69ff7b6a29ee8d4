"""How a trainer's sequences become steps."""

from __future__ import annotations

from pydantic import Field

from kdmesh.config import StrictModel


class BatchConfig(StrictModel):
    """How sequences become steps and micro-batches."""

    sequences: int = Field(32, ge=1, le=1_000_000)
    """Sequences of one optimizer step, over all ranks."""

    max_tokens: int = Field(8192, ge=8)
    """Tokens of one micro-batch on one rank, or on the ranks of `parallel.context` together; a longer single sequence
    is refused."""
