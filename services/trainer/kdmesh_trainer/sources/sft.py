"""The data's own tokens, without a teacher."""

from __future__ import annotations

from kdmesh_trainer.sources.batches import MicroBatch, StepBatch
from kdmesh_trainer.sources.plan import StepPlanner


class SftSource:
    """A Source whose micro-batches have no teacher."""

    def __init__(self, planner: StepPlanner) -> None:
        self._planner = planner
        self._step = 0

    def start_at(self, step: int) -> None:
        """Make `step` the first one that next_batch gives."""
        self._step = step

    def next_batch(self) -> StepBatch:
        """The next step's share of this rank."""
        step, share = self._step, self._planner.share(self._step)
        self._step += 1
        return StepBatch(
            step=step,
            micro_batches=tuple(MicroBatch(sequences=group, teacher=None) for group in share.micro_batches),
            num_loss_tokens=share.num_loss_tokens,
            num_tokens=share.num_tokens,
            loss_weight=share.loss_weight,
            datasets=share.datasets,
        )
