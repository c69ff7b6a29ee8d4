"""The data's own tokens with a teacher's rows, asked for while earlier ones are trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from kdmesh.types import TokenSequence
from kdmesh_trainer.sources.batches import MicroBatch, PendingRows, StepBatch, TeacherRows
from kdmesh_trainer.sources.plan import StepPlanner


class RowService(Protocol):
    """Where a teacher's rows come from."""

    def submit(self, sequences: Sequence[TokenSequence]) -> PendingRows:
        """Ask for the rows of a group of sequences, in their order. Does not block."""
        ...


class OffPolicySource:
    """A Source that keeps the teacher at work on the micro-batches that come next.

    While one micro-batch is trained on, up to `prefetch` later ones are asked for, across the
    ends of steps; while it is waited for, one more. What is trained on, and in which
    order, does not depend on `prefetch`. Rows must be waited for in order.
    """

    def __init__(self, planner: StepPlanner, teacher: RowService, *, prefetch: int, steps: int) -> None:
        """
        Args:
            steps: of the whole run; nothing beyond them is asked for ahead.
        """
        self._planner = planner
        self._teacher = teacher
        self._prefetch = prefetch
        self._steps = steps
        self._next_planned = 0
        self._planned: deque[StepBatch] = deque()  # not handed out yet
        self._asks: deque[_Ask] = deque()  # not waited for yet, in order; the first ones are asked
        self._num_asked = 0

    def start_at(self, step: int) -> None:
        """Make `step` the first one that next_batch gives."""
        self._next_planned = step

    def next_batch(self) -> StepBatch:
        """The next step's share of this rank."""
        if not self._planned:
            self._plan_one()
        return self._planned.popleft()

    def close(self) -> None:
        """Drop what was asked for and not waited for: that cancels it. Its rows must not be waited for any more."""
        for ask in self._asks:
            ask.drop()
        self._planned.clear()
        self._asks.clear()
        self._num_asked = 0

    def collect(self, ask: _Ask) -> TeacherRows:
        """Block until the rows of `ask`, the next one in order, are here; PendingRows.wait."""
        assert self._asks and self._asks[0] is ask, "rows must be waited for once, in order, before close"
        self._ask_ahead()
        self._asks.popleft()
        self._num_asked -= 1
        return ask.take().wait()

    def _ask_ahead(self) -> None:
        """Have the next `prefetch` + 1 micro-batches asked for."""
        while self._num_asked <= self._prefetch:
            if self._num_asked < len(self._asks):
                ask = self._asks[self._num_asked]
                ask.send(self._teacher)
                self._num_asked += 1
            # The second bound: a rank whose shares are empty would plan on for ever.
            elif self._next_planned < self._steps and len(self._planned) <= self._prefetch:
                self._plan_one()
            else:
                return

    def _plan_one(self) -> None:
        share = self._planner.share(self._next_planned)
        micro_batches = tuple(
            MicroBatch(sequences=group, teacher=_Ask(self, group) if group else None) for group in share.micro_batches
        )
        self._planned.append(
            StepBatch(
                step=self._next_planned,
                micro_batches=micro_batches,
                num_loss_tokens=share.num_loss_tokens,
                num_tokens=share.num_tokens,
            )
        )
        self._asks.extend(m.teacher for m in micro_batches if isinstance(m.teacher, _Ask))
        self._next_planned += 1


class _Ask:
    """One micro-batch's rows: asked for ahead of time, or when they are waited for."""

    def __init__(self, source: OffPolicySource, sequences: tuple[TokenSequence, ...]) -> None:
        self._source = source
        self._sequences = sequences
        self._pending: PendingRows | None = None

    def send(self, teacher: RowService) -> None:
        """Ask the teacher. Called once."""
        self._pending = teacher.submit(self._sequences)

    def take(self) -> PendingRows:
        """What was asked for, which from now on belongs to the caller."""
        pending, self._pending = self._pending, None
        assert pending is not None
        return pending

    def drop(self) -> None:
        """Want the rows no more."""
        self._pending = None

    def wait(self) -> TeacherRows:
        """See PendingRows."""
        return self._source.collect(self)
