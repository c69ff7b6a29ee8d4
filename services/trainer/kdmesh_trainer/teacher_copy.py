"""The weights of a teacher that follows the student."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.student.shards import own_shard
from kdmesh_trainer.student.weights import StudentWeight, without_aliases


class TeacherCopy:
    """What the teacher is to have: the student, or its moving average, as it was at the last update.

    Kept in the student's element type and in its shards, and only of what training changes and cannot be had from the
    student any more: the average, and, when updates do not come after every step, what was sent last.
    """

    def __init__(self, student: Student, *, every: int, decay: float | None) -> None:
        """
        Args:
            student: sharded.
            every: steps between updates.
            decay: of the average, a <- decay * a + (1 - decay) * student after every step; None: there is none.
        """
        self._student = student
        self._every = every
        self._decay = decay
        self._own = without_aliases(student.weights())
        self._average = {} if decay is None else self._now()
        self._sent = {} if every == 1 else self._now()

    @property
    def weights(self) -> Mapping[str, StudentWeight]:
        """By their Hugging Face names, tied ones once. They hold what the teacher is to have at any time."""
        kept = self._sent or self._average
        return {
            name: StudentWeight(base=kept[name], added=None) if name in kept else weight
            for name, weight in self._own.items()
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that a checkpoint must hold; to continue, their values are replaced in place."""
        return {"average": self._average, "sent": self._sent}

    @torch.no_grad()
    def advance(self, steps_done: int) -> bool:
        """The student has done a step; whether the teacher is to get new weights. Called once after every step."""
        release(self._student)
        for name, average in self._average.items():
            assert self._decay is not None
            own_shard(average).lerp_(own_shard(self._own[name].shard()), 1 - self._decay)
        if steps_done % self._every:
            return False
        for name, sent in self._sent.items():
            newest = self._average[name] if self._average else self._own[name].shard()
            own_shard(sent).copy_(own_shard(newest))
        return True

    def _now(self) -> dict[str, Tensor]:
        """A copy of what training changes."""
        release(self._student)
        return {name: weight.shard().clone() for name, weight in self._own.items() if weight.can_change}
