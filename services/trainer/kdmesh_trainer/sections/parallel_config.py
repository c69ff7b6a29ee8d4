"""How the ranks of a trainer share its student and its tokens, and which memory holds the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from kdmesh.config import StrictModel
from kdmesh.errors import ConfigError

if TYPE_CHECKING:
    from kdmesh.models.context import Exchange  # which loads torch

Gather: TypeAlias = Literal["auto", "step", "micro_batch"]

SPREAD_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_kl",
    "skewed_reverse_kl",
    "total_variation",
    "renyi",
    "alpha_beta",
    "masked_reverse_kl",
    "sampled_reverse_kl",
)
"""Those that follow from what each rank makes of its own tokens; the others look at a row as a whole."""


class ParallelConfig(StrictModel):
    """How ranks share the student and its tokens, and where they keep it (docs/parallelism.md)."""

    shard_ranks: int | None = Field(None, ge=1)
    """Ranks that hold one copy of the student between them, each of them a part of it; divides the number of ranks.
    null: all of them hold one. Fewer hold several copies (HSDP): more memory, and what is gathered comes from fewer."""

    context: int = Field(1, ge=1)
    """Ranks that hold the tokens of a micro-batch together, each an equal slice: for sequences whose activations are
    too large for one. Divides the number of ranks; 1: every rank has its own micro-batches."""

    context_exchange: Literal["auto", "heads", "keys"] = "auto"
    """What those ranks exchange in attention. heads: each attends for all tokens with its share of the heads, which
    `context` divides (Ulysses). keys: each for its own tokens, with keys and values of ranks before it. auto: heads
    where `context` divides the student's, otherwise keys."""

    offload: Literal["none", "all"] = "none"
    """What lies in the host's memory instead of the device's: all is parameters, gradients and AdamW's moments. The
    same student, a slower step; on a CPU both memories are one, and nothing is moved."""

    gather: Gather = "auto"
    """How often ranks gather the student's parameters, and reduce its gradients. step: once; each rank then has whole
    parameters, and whole gradients in float32, from the first micro-batch of a step to the last. micro_batch: twice for
    each of them, a few layers at a time. auto: step below 2 GiB of float32 parameters, micro_batch from there on; a
    single rank keeps the student whole (docs/parallelism.md)."""

    head: Literal["whole", "vocabulary"] = "whole"
    """Who computes logits. whole: each rank for its own rows, with the whole output heads of student and teacher.
    vocabulary: each rank for the rows of all, over the tokens that it has of both heads: their memory, and that of
    logits, is divided by the number of ranks, and hidden states travel."""

    def exchange(self, num_heads: int) -> Exchange:
        """What the ranks that hold a micro-batch together exchange, for a student of so many attention heads."""
        if self.context_exchange == "auto":
            return "keys" if num_heads % self.context else "heads"
        return self.context_exchange

    def check_ranks(self, ranks: int) -> None:
        """Return when so many ranks can share the student like this. Raises ConfigError."""
        if self.shard_ranks is not None and ranks % self.shard_ranks:
            raise ConfigError(
                f"parallel.shard_ranks is {self.shard_ranks} and the job has {ranks} ranks; shard_ranks must divide "
                "their number, so that every copy of the student has as many"
            )
        if ranks % self.context:
            raise ConfigError(
                f"parallel.context is {self.context} and the job has {ranks} ranks; context must divide their number, "
                "so that every micro-batch is held by as many"
            )
