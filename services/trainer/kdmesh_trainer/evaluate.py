"""Judges the student on held-out data, through the same services and the same plan as training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from kdmesh.batching import plan_step
from kdmesh.losses import forward_kl
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.seam import Terms
from kdmesh_trainer.head import Heads
from kdmesh_trainer.loop import Stop
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.model import Student, release
from kdmesh_trainer.objective import CrossEntropy, Distillation, Objective
from kdmesh_trainer.sources.batches import MicroBatch, PendingRows
from kdmesh_trainer.sources.context_rows import ContextRows, asking
from kdmesh_trainer.sources.row_queue import RowService
from kdmesh_trainer.sources.sides import teacher_side
from kdmesh_trainer.spread_objective import spread
from kdmesh_trainer.stats import Scores
from kdmesh_trainer.step import forward
from kdmesh_trainer.stop import NEVER, Stopping
from kdmesh_trainer.tally import Tally

_PLANNED_TOGETHER = 4096


class HeldOutEvaluator:
    """KL(teacher || student) at temperature 1 where there is a teacher, and cross-entropy, over all held-out data."""

    def __init__(
        self,
        student: Student,
        sequences: Sequence[TokenSequence],
        *,
        teacher: RowService | None,
        teacher_head: Heads | None,
        max_tokens: int,
        prefetch: int,
        mesh: Mesh,
    ) -> None:
        """
        Args:
            sequences: the same on every rank; at least one.
            max_tokens: of one micro-batch.
            prefetch: micro-batches to ask the teacher for ahead of the one that is judged.
        """
        self._shares = list(_shares(sequences, max_tokens, mesh))
        self._num_sequences = len(sequences)
        self._student = student
        self._teacher = teacher
        self._names = ("",) if teacher_head is None else teacher_head.names
        judge = _judge(teacher_head)
        self._objective = judge if student.share is None else spread(judge, student.share)
        self._prefetch = prefetch
        self._mesh = mesh

    @torch.no_grad()
    def evaluate(self, *, stop: Stop = NEVER) -> Scores:
        """The student as it is now. Collective.

        Raises:
            Stopping: `stop` is wanted, before the end.
            ModelMismatch: the teacher's rows are not all of one weight version.
            RpcError: rows of the teacher did not come.
        """
        self._student.eval()
        tally = Tally(self._mesh, teachers=self._names)
        for micro_batch in self._micro_batches():
            if stop.is_wanted():
                raise Stopping
            tally.add(forward(self._student, self._objective, micro_batch, tally, self._mesh.device))
        release(self._student)
        totals, _ = tally.over_all_ranks()
        return Scores(
            kl_nats_per_token=totals.divergence_nats_per_token,
            cross_entropy_nats_per_token=totals.cross_entropy / totals.num_labelled,
            top1_agreement=totals.top1_agreement_per_token,
            num_loss_tokens=totals.num_labelled,
            num_sequences=self._num_sequences,
        )

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's share; the teacher is asked for each one `prefetch` places before its turn."""
        ahead: deque[MicroBatch] = deque()
        context = ContextRows.of(self._mesh, self._names)
        for sequences in self._shares:
            is_asked = self._teacher is not None
            ahead.append(
                asking(sequences, self._ask, context) if is_asked else MicroBatch(sequences=sequences, teacher=None)
            )
            if len(ahead) > self._prefetch:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()

    def _ask(self, sequences: tuple[TokenSequence, ...]) -> PendingRows:
        assert self._teacher is not None
        return self._teacher.submit(teacher_side(sequences))


def _shares(sequences: Sequence[TokenSequence], max_tokens: int, mesh: Mesh) -> Iterator[tuple[TokenSequence, ...]]:
    """This rank's micro-batches, planned in groups, because the time of one plan grows faster than its size."""
    for first in range(0, len(sequences), _PLANNED_TOGETHER):
        group = sequences[first : first + _PLANNED_TOGETHER]
        plan = plan_step([s.num_tokens for s in group], ranks=mesh.num_data_groups, max_tokens=max_tokens)
        for members in plan[mesh.data_group]:
            yield tuple(group[index] for index in members)


def _judge(teacher_head: Heads | None) -> Objective:
    if teacher_head is None:
        return CrossEntropy()
    terms = Terms(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
    return Distillation(terms=terms, teacher_head=teacher_head)
