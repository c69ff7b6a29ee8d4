"""Adds up what the micro-batches of a pass measured, over all ranks, without waiting for the device in between."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdmesh.errors import ModelMismatch
from kdmesh.losses import FusedLoss
from kdmesh.models.packing import moved
from kdmesh_trainer.data.encoding.sides import Int64Array, answered_rows, teacher_side
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.batches import MicroBatch, PanelPart, PanelRows, TeacherRows
from kdmesh_trainer.sources.outage import Outage
from kdmesh_trainer.stats import SampleScores, TeacherFigures
from kdmesh_trainer.student.model import LossTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over all rows of all ranks, equal on every rank."""

    loss: float  # where rows have weights, by these relative to their mean
    divergence: float
    cross_entropy: float
    top1_agreement: float
    topk_overlap: float
    layer_distances: float
    num_diverging: int  # rows that have a divergence
    num_labelled: int  # rows that have a cross-entropy
    num_overlapping: int  # rows that have a top-k overlap
    num_preferring: int  # rows of which it is known whether both prefer the same token
    num_layered: int  # rows whose layers are compared
    teachers: Mapping[str, TeacherFigures]  # by name; that of the only one is empty
    samples: SampleScores | None  # None: no row was sampled

    @property
    def teacher_wait_s(self) -> float:
        """Mean over ranks of the time spent waiting for rows."""
        return sum(teacher.wait_s for teacher in self.teachers.values())

    @property
    def divergence_nats_per_token(self) -> float | None:
        """None when no row has one."""
        return self.divergence / self.num_diverging if self.num_diverging else None

    @property
    def cross_entropy_nats_per_token(self) -> float | None:
        """None when no row has one."""
        return self.cross_entropy / self.num_labelled if self.num_labelled else None

    @property
    def top1_agreement_per_token(self) -> float | None:
        """None when no row has one."""
        return self.top1_agreement / self.num_preferring if self.num_preferring else None

    @property
    def topk_overlap_per_token(self) -> float | None:
        """None when no row has one."""
        return self.topk_overlap / self.num_overlapping if self.num_overlapping else None

    @property
    def layer_distance(self) -> float | None:
        """Of a row; None when no row has one."""
        return self.layer_distances / self.num_layered if self.num_layered else None


class _Teacher:
    """What this rank has seen of one teacher since its tally began."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._version: int | None = None
        self._num_tokens = 0
        self._num_rows = 0
        self._wait_s = 0.0

    def add(self, rows: TeacherRows, *, num_tokens: int, wait_s: float) -> None:
        """Count in what it answered."""
        if self._version not in (None, rows.weight_version):
            raise self._mixed(rows.weight_version)
        self._version = rows.weight_version
        self._num_tokens += num_tokens
        self._num_rows += len(rows.rows_RD)
        self._wait_s += wait_s

    def own(self) -> list[float]:
        """This rank's part of what `figures` gets the sums of."""
        return [self._num_tokens, self._num_rows, self._wait_s, self._version or 0, self._version is not None]

    def figures(self, sums: Sequence[float], *, ranks: int) -> TeacherFigures:
        """Over all ranks. Raises ModelMismatch when another rank's rows have another weight version."""
        tokens, rows, wait_s, versions, num_versions = sums
        if self._version is not None and versions != num_versions * self._version:
            raise self._mixed("another on another rank")
        return TeacherFigures(tokens=round(tokens), loss_tokens=round(rows), wait_s=wait_s / ranks)

    def _mixed(self, other: int | str) -> ModelMismatch:
        whose = f"the rows of teacher {self._name}" if self._name else "the teacher's rows"
        return ModelMismatch(
            f"{whose} of one step have weight version {self._version} and {other}; a step never mixes versions"
        )


_NUM_OWN = len(_Teacher("").own())


class Tally:
    """This rank's part of a step or an evaluation."""

    def __init__(self, mesh: Mesh, *, teachers: Sequence[str] = ("",), outage: Outage | None = None) -> None:
        """
        Args:
            teachers: names of those that rows may come from; that of the only one is empty.
            outage: of these; None: rows that do not come are raised where they are waited for.
        """
        self._mesh = mesh
        self._outage = outage or Outage()
        self._teachers = {name: _Teacher(name) for name in teachers}
        self._sums_5 = torch.zeros(5, dtype=torch.float64, device=mesh.device)
        self._samples_4 = torch.zeros(4, dtype=torch.float64, device=mesh.device)
        self._layered_1 = torch.zeros(1, dtype=torch.float64, device=mesh.device)
        self._num_sampled = 0
        self._num_compared = 0  # sampled rows that have a cross-entropy
        self._num_diverging = 0
        self._num_labelled = 0
        self._num_overlapping = 0
        self._num_preferring = 0
        self._num_weighed = 0  # sampled rows that have entropies
        self._num_layered = 0

    def wait(self, micro_batch: MicroBatch) -> TeacherRows | PanelRows | None:
        """Its rows, with the time they took on record.

        Raises:
            ModelMismatch: this rank has seen rows of another weight version since this tally began.
        """
        if micro_batch.teacher is None:
            return None
        began_s = time.perf_counter()
        rows = micro_batch.teacher.wait()
        wait_s = time.perf_counter() - began_s
        if isinstance(rows, PanelRows):
            for part in rows.parts:
                self._teachers[part.name].add(part.rows, num_tokens=part.num_tokens, wait_s=part.wait_s)
            # Of some that this rank asked for it may have handed all rows to others.
            return PanelRows(parts=tuple(part for part in rows.parts if len(part.rows.rows_RD)))
        asked = micro_batch.sequences if micro_batch.asked is None else micro_batch.asked
        num_tokens = sum(sequence.num_tokens for sequence in teacher_side(asked))
        self._teachers[""].add(rows, num_tokens=num_tokens, wait_s=wait_s)
        answered = answered_rows(micro_batch.sequences)
        if answered is None:
            return rows
        index_R = torch.from_numpy(answered)
        return PanelRows(parts=(PanelPart(name="", rows=rows, index_R=index_R, num_tokens=num_tokens, wait_s=wait_s),))

    def add(self, totals: LossTotals) -> None:
        """Count one micro-batch in."""
        self._sums_5 += totals.sums_5
        self._num_diverging += totals.num_diverging
        self._num_labelled += totals.num_labelled
        self._num_overlapping += totals.num_overlapping
        self._num_preferring += totals.num_preferring

    def look_at_layers(self, distance_R: Tensor) -> None:
        """Count in how far the layers of one micro-batch's rows are from the teacher's."""
        self._layered_1 += distance_R.double().sum()
        self._num_layered += len(distance_R)

    def look_at_samples(
        self, loss: FusedLoss, rollout_logprobs_S: Tensor | None, *, answered_A: Int64Array | None = None
    ) -> None:
        """Count in how one micro-batch's sampled tokens are seen.

        Args:
            loss: with entropies, if the objective has them; fewer than rows where some have no teacher.
            rollout_logprobs_S: of the first labels, on the CPU; None where nothing was sampled.
            answered_A: which rows have a teacher's, in order; None: all.
        """
        if rollout_logprobs_S is None:
            return
        # Without labels there is no difference to sum up, and it is told as nothing.
        num_sampled = len(rollout_logprobs_S)
        cross_entropy_S = loss.cross_entropy_R[:num_sampled].double()
        sampled_S = moved(rollout_logprobs_S[: len(cross_entropy_S)], cross_entropy_S.device)
        difference_S = sampled_S.double() + cross_entropy_S
        k3_S = difference_S + (-difference_S).expm1()
        num_answered = num_sampled if answered_A is None else int((answered_A < num_sampled).sum())
        entropies = loss.student_entropy_R[:num_answered], loss.teacher_entropy_R[:num_answered]
        self._samples_4 += torch.stack([values_S.double().sum() for values_S in (difference_S, k3_S, *entropies)])
        self._num_sampled += num_sampled
        self._num_compared += len(cross_entropy_S)
        self._num_weighed += len(entropies[0])

    def over_all_ranks(self, *more: Tensor) -> tuple[Totals, tuple[float, ...]]:
        """The sums, and the plain values of `more`, which are scalars and equal on every rank. Collective.

        The one place where a step waits for the device.

        Raises:
            StepLost: rows of a rank did not come.
            ModelMismatch: another rank's rows have another weight version. Not every rank notices.
        """
        own = [self._num_diverging, self._num_labelled, self._num_overlapping, self._num_sampled, self._num_compared]
        own += [self._num_preferring, self._num_weighed, self._num_layered, self._outage.has_begun]
        seen = [number for teacher in self._teachers.values() for number in teacher.own()]
        counted = self._sums_5.new_tensor([*own, *seen])
        sums = self._mesh.sum(torch.cat([self._sums_5, self._samples_4, self._layered_1, counted]))
        # A norm of gradients that the host keeps is there too.
        values = torch.cat([sums, *(value.to(sums).reshape(1) for value in more)]).tolist()
        if values[18]:
            self._outage.leave(self._mesh)
        teachers = {
            name: teacher.figures(values[first : first + _NUM_OWN], ranks=self._mesh.world_size)
            for (name, teacher), first in zip(self._teachers.items(), range(19, len(sums), _NUM_OWN), strict=True)
        }
        totals = Totals(
            loss=values[0],
            divergence=values[1],
            cross_entropy=values[2],
            top1_agreement=values[3],
            topk_overlap=values[4],
            layer_distances=values[9],
            num_diverging=round(values[10]),
            num_labelled=round(values[11]),
            num_overlapping=round(values[12]),
            num_preferring=round(values[15]),
            num_layered=round(values[17]),
            teachers=teachers,
            samples=_scores(values[5:9], *map(round, values[13:15]), num_weighed=round(values[16])),
        )
        return totals, tuple(values[len(sums) :])


def _scores(sums: list[float], num_sampled: int, num_compared: int, *, num_weighed: int) -> SampleScores | None:
    if num_sampled == 0:
        return None
    return SampleScores(
        sampler_kl_k1_nats=sums[0] / num_compared if num_compared else None,
        sampler_kl_k3_nats=sums[1] / num_compared if num_compared else None,
        student_entropy_nats=sums[2] / num_weighed if num_weighed else None,
        teacher_entropy_nats=sums[3] / num_weighed if num_weighed else None,
    )
