"""Judges the student on held-out data, through the same services and the same plan as training."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from kdmesh.batching import plan_step
from kdmesh.losses import forward_kl
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.seam import Terms
from kdmesh_trainer.data.encoding.sides import teacher_side
from kdmesh_trainer.loop import Stop
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import Heads
from kdmesh_trainer.objectives.objective import CrossEntropy, Distillation, Objective
from kdmesh_trainer.objectives.spread import spread
from kdmesh_trainer.sources.batches import MicroBatch, PendingRows
from kdmesh_trainer.sources.context_rows import ContextRows, asking
from kdmesh_trainer.sources.outage import Outage
from kdmesh_trainer.sources.row_queue import RowService
from kdmesh_trainer.stats import Scores
from kdmesh_trainer.step import forward
from kdmesh_trainer.stop import NEVER, Stopping
from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.tally import Tally, Totals

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
        parts: Mapping[str, int] | None = None,
        outage: Outage | None = None,
    ) -> None:
        """
        Args:
            sequences: the same on every rank; at least one.
            max_tokens: of one micro-batch.
            prefetch: micro-batches to ask the teacher for ahead of the one that is judged.
            parts: how many of the sequences are of each of several datasets, in order, by name; None: they are of one.
            outage: see Tally.
        """
        self._sizes = {"": len(sequences), **(parts or {})}
        rest = iter(sequences)
        self._shares = [
            (name, share)
            for name, size in (parts or self._sizes).items()
            for share in _shares(list(itertools.islice(rest, size)), max_tokens, mesh)
        ]
        self._student = student
        self._teacher = teacher
        self._names = ("",) if teacher_head is None else teacher_head.names
        judge = _judge(teacher_head)
        self._objective = judge if student.share is None else spread(judge, student.share)
        self._prefetch = prefetch
        self._mesh = mesh
        self._outage = outage

    @torch.no_grad()
    def evaluate(self, *, stop: Stop = NEVER) -> Scores:
        """The student as it is now. Collective.

        Raises:
            Stopping: `stop` is wanted, before the end.
            ModelMismatch: the teacher's rows are not all of one weight version.
            StepLost: rows of the teacher did not come.
        """
        self._student.eval()
        tallies = {name: Tally(self._mesh, teachers=self._names, outage=self._outage) for name in self._sizes}
        for name, micro_batch in self._micro_batches():
            if stop.is_wanted():
                raise Stopping
            totals = forward(self._student, self._objective, micro_batch, tallies[""], self._mesh.device)
            for each in {"", name}:
                tallies[each].add(totals)
        release(self._student)
        whole, *parts = (self._scores(name, tally.over_all_ranks()[0]) for name, tally in tallies.items())
        return replace(whole, datasets=dict(zip(list(self._sizes)[1:], parts, strict=True)))

    def _scores(self, name: str, totals: Totals) -> Scores:
        return Scores(
            kl_nats_per_token=totals.divergence_nats_per_token,
            cross_entropy_nats_per_token=totals.cross_entropy / totals.num_labelled,
            top1_agreement=totals.top1_agreement_per_token,
            num_loss_tokens=totals.num_labelled,
            num_sequences=self._sizes[name],
        )

    def _micro_batches(self) -> Iterator[tuple[str, MicroBatch]]:
        """This rank's share, by dataset; the teacher is asked for each one `prefetch` places before its turn."""
        ahead: deque[tuple[str, MicroBatch]] = deque()
        context = ContextRows.of(self._mesh, self._names)
        for name, sequences in self._shares:
            is_asked = self._teacher is not None
            micro_batch = (
                asking(sequences, self._ask, context) if is_asked else MicroBatch(sequences=sequences, teacher=None)
            )
            ahead.append((name, micro_batch))
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
