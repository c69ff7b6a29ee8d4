"""Asks a teacher for rows before they are needed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import teacher_side
from kdmesh_trainer.sources.batches import AskedRows, PanelRows, PendingRows, TeacherRows


class RowService(Protocol):
    """Where a teacher's rows come from."""

    def submit(self, sequences: Sequence[TokenSequence]) -> AskedRows:
        """Ask for the rows of a group of sequences, as the teacher reads them, in their order. Does not block."""
        ...


class RowQueue:
    """Rows that will be waited for in order, of which the next few are asked for.

    While a group's rows are used, up to `prefetch` later groups are asked for; while they are
    waited for, one more.

    Where the teacher's weights are replaced every few steps, no group is asked for before the weights are served that
    it is to be trained with: rows and head of a step are always of the same.
    """

    def __init__(
        self, teacher: RowService, *, prefetch: int, extend: Callable[[], bool], update_every: int | None
    ) -> None:
        """
        Args:
            extend: called when fewer groups are known than may be asked for; adds some, or returns False.
            update_every: the teacher gets new weights before each step that this divides; None: never.
        """
        self._teacher = teacher
        self._update_every = update_every
        self._until: float = math.inf  # groups of this step and later ones wait
        self._prefetch = prefetch
        self._extend = extend
        self._asks: deque[_Ask] = deque()  # not waited for yet, in order; the first ones are asked
        self._num_asked = 0

    def teacher_age(self, step: int) -> int | None:
        """Steps between the last update of the teacher and this one; None: there is none."""
        return None if self._update_every is None else step % self._update_every

    def begin(self, step: int) -> float:
        """This step is trained on next, and the teacher has the weights for it; the first step that it has not."""
        if self._update_every is not None:
            self._until = (step // self._update_every + 1) * self._update_every
        return self._until

    def add(self, sequences: tuple[TokenSequence, ...], *, step: int) -> PendingRows:
        """The rows of one more group of a step, at least one sequence; asked for when their turn comes near."""
        ask = _Ask(self, sequences, step)
        self._asks.append(ask)
        return ask

    def ask_ahead(self) -> None:
        """Have the next `prefetch` groups asked for, so that they are under way before the first is waited for."""
        self._ask_for(self._prefetch)

    def close(self) -> None:
        """Drop what was asked for and not waited for: that cancels it. It must not be waited for any more."""
        for ask in self._asks:
            ask.drop()
        self._asks.clear()
        self._num_asked = 0

    def collect(self, ask: _Ask) -> TeacherRows | PanelRows:
        """Block until the rows of `ask`, the next one in order, are here; PendingRows.wait."""
        assert self._asks and self._asks[0] is ask, "rows must be waited for once, in order, before close"
        self._ask_for(self._prefetch + 1)
        self._asks.popleft()
        self._num_asked -= 1
        return ask.take().wait()

    def _ask_for(self, number: int) -> None:
        """Have the next `number` groups asked for."""
        while self._num_asked < number:
            if self._num_asked < len(self._asks):
                ask = self._asks[self._num_asked]
                if ask.step >= self._until:
                    return
                ask.send(self._teacher)
                self._num_asked += 1
            elif not self._extend():
                return


class _Ask:
    """One group's rows: asked for ahead of time, or when they are waited for."""

    def __init__(self, queue: RowQueue, sequences: tuple[TokenSequence, ...], step: int) -> None:
        self.step = step
        self._queue = queue
        self._sequences = sequences
        self._pending: PendingRows | None = None

    def send(self, teacher: RowService) -> None:
        """Ask the teacher. Called once."""
        self._pending = teacher.submit(teacher_side(self._sequences))

    def take(self) -> PendingRows:
        """What was asked for, which from now on belongs to the caller."""
        pending, self._pending = self._pending, None
        assert pending is not None
        return pending

    def drop(self) -> None:
        """Want the rows no more."""
        self._pending = None

    def wait(self) -> TeacherRows | PanelRows:
        """See PendingRows."""
        return self._queue.collect(self)
