"""The data's own tokens with a teacher's rows, asked for while earlier ones are trained on."""

from __future__ import annotations

from collections import deque
from functools import partial

from kdmesh_trainer.sources.batches import StepBatch
from kdmesh_trainer.sources.context_rows import ContextRows, asking
from kdmesh_trainer.sources.plan import StepPlanner
from kdmesh_trainer.sources.row_queue import RowQueue, RowService


class OffPolicySource:
    """A Source that keeps the teacher at work on the micro-batches that come next.

    While one micro-batch is trained on, up to `prefetch` later ones are asked for, across the
    ends of steps; while it is waited for, one more. What is trained on, and in which
    order, does not depend on `prefetch`. Rows must be waited for in order.
    """

    def __init__(
        self,
        planner: StepPlanner,
        teacher: RowService,
        *,
        prefetch: int,
        steps: int,
        teacher_update_every: int | None = None,
        context: ContextRows | None = None,
    ) -> None:
        """
        Args:
            steps: of the whole run; nothing beyond them is asked for ahead.
            teacher_update_every: see RowQueue.
            context: None: each rank has micro-batches of its own.
        """
        self._planner = planner
        self._rows = RowQueue(teacher, prefetch=prefetch, extend=self._plan_ahead, update_every=teacher_update_every)
        self._prefetch = prefetch
        self._steps = steps
        self._context = context
        self._next_planned = 0
        self._planned: deque[StepBatch] = deque()  # not handed out yet

    def start_at(self, step: int) -> None:
        """Make `step` the first one that next_batch gives."""
        self._next_planned = step

    def next_batch(self) -> StepBatch:
        """The next step's share of this rank."""
        if not self._planned:
            self._plan_one()
        batch = self._planned.popleft()
        self._rows.begin(batch.step)
        return batch

    def close(self) -> None:
        """Drop what was asked for and not waited for: that cancels it. Its rows must not be waited for any more."""
        self._planned.clear()
        self._rows.close()

    def _plan_ahead(self) -> bool:
        # The second bound: a rank whose shares are empty would plan on for ever.
        if self._next_planned >= self._steps or len(self._planned) > self._prefetch:
            return False
        self._plan_one()
        return True

    def _plan_one(self) -> None:
        share = self._planner.share(self._next_planned)
        ask = partial(self._rows.add, step=self._next_planned)
        micro_batches = tuple(asking(group, ask, self._context) for group in share.micro_batches)
        self._planned.append(
            StepBatch(
                step=self._next_planned,
                micro_batches=micro_batches,
                num_loss_tokens=share.num_loss_tokens,
                num_tokens=share.num_tokens,
                loss_weight=share.loss_weight,
                teacher_age_steps=self._rows.teacher_age(self._next_planned),
                datasets=share.datasets,
            )
        )
        self._next_planned += 1
