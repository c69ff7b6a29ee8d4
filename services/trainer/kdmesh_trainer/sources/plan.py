"""One rank's share of each step, or that of a group of ranks which hold each row of tokens together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdmesh.batching import plan_step
from kdmesh.types import TokenSequence
from kdmesh_trainer.sections.batch_config import BatchConfig
from kdmesh_trainer.sources.order import step_order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepShare:
    """What one rank trains on in one step."""

    micro_batches: tuple[tuple[TokenSequence, ...], ...]  # at least one; as many on every rank; each may be empty
    num_loss_tokens: int  # over all ranks
    num_tokens: int  # over all ranks
    loss_weight: float  # of all loss tokens, over all ranks
    datasets: Mapping[str, int]  # sequences of each dataset of a blend over all ranks, by name; empty: it is none


class StepPlanner:
    """Splits each step over the ranks. Every rank plans all of it, so nothing needs to be communicated."""

    def __init__(
        self, sequences: Sequence[TokenSequence], batch: BatchConfig, *, seed: int, rank: int, ranks: int
    ) -> None:
        """
        Args:
            sequences: the same on every rank; at least one, none longer than batch.max_tokens.
            seed: of the order.
            rank: or the number of a group that trains together.
            ranks: or how many such groups there are.
        """
        self._sequences = sequences
        self._batch = batch
        self._order = step_order(sequences, per_step=batch.sequences, seed=seed)
        self._rank = rank
        self._ranks = ranks

    def share(self, step: int) -> StepShare:
        """This rank's share of step `step`; a pure function."""
        chosen = [self._sequences[index] for index in self._order.of_step(step)]
        plan = plan_step([s.num_tokens for s in chosen], ranks=self._ranks, max_tokens=self._batch.max_tokens)
        return StepShare(
            micro_batches=tuple(tuple(chosen[index] for index in members) for members in plan[self._rank]),
            num_loss_tokens=sum(s.num_rows for s in chosen),
            num_tokens=sum(s.num_tokens for s in chosen),
            loss_weight=math.fsum(s.weight * s.num_rows for s in chosen),
            datasets=self._order.counts(step),
        )
