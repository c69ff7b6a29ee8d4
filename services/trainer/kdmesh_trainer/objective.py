"""What the student is trained to minimise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.losses import (
    Divergence,
    FusedLoss,
    OutputHead,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)
from kdmesh_trainer.head import TeacherHead
from kdmesh_trainer.sources.batches import TeacherRows


class Objective(Protocol):
    """The loss of one micro-batch's rows."""

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        labels_R: Tensor,
        teacher: TeacherRows | None,
        *,
        num_sampled: int = 0,
    ) -> FusedLoss:
        """Summed over rows, never averaged.

        Args:
            teacher: rows of the same positions; None where the source asks no teacher, or R is 0.
            num_sampled: the first rows, whose labels the student drew, so that they are not imitated.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """kd_weight * divergence(student, teacher) + ce_weight * cross-entropy."""

    divergence: Divergence
    temperature: float
    kd_weight: float
    ce_weight: float
    teacher_head: TeacherHead
    with_entropies: bool = False
    top_k: int = 0  # compared tokens; 0 compares none

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        labels_R: Tensor,
        teacher: TeacherRows | None,
        *,
        num_sampled: int = 0,
    ) -> FusedLoss:
        """The mix; without teacher rows there is nothing to learn from, so R must be 0."""
        if teacher is None:
            assert len(labels_R) == 0
            return fused_linear_cross_entropy(student_hidden_RD, student_head, labels_R)
        head = self.teacher_head.at(teacher.weight_version)
        teacher_RE = teacher.rows_RD.to(student_hidden_RD.device)
        if num_sampled == 0 or self.ce_weight == 0:
            return self._mixed(student_hidden_RD, student_head, teacher_RE, head, labels_R, ce_weight=self.ce_weight)
        weights = ((slice(0, num_sampled), 0.0), (slice(num_sampled, None), self.ce_weight))
        parts = [
            self._mixed(student_hidden_RD[rows], student_head, teacher_RE[rows], head, labels_R[rows], ce_weight=weight)
            for rows, weight in weights
            if len(labels_R[rows]) > 0
        ]
        return _joined(parts)

    def _mixed(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        teacher_hidden_RE: Tensor,
        teacher_head: OutputHead,
        labels_R: Tensor,
        *,
        ce_weight: float,
    ) -> FusedLoss:
        return fused_linear_divergence(
            student_hidden_RD,
            student_head,
            teacher_hidden_RE,
            teacher_head,
            divergence=self.divergence,
            temperature=self.temperature,
            # At another temperature cross-entropy costs a second softmax: only where it is learnt from.
            labels_R=labels_R if self.ce_weight > 0 or self.temperature == 1 else None,
            kd_weight=self.kd_weight,
            ce_weight=ce_weight,
            with_entropies=self.with_entropies,
            top_k=self.top_k,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy on the data's own tokens."""

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        labels_R: Tensor,
        teacher: TeacherRows | None,
        *,
        num_sampled: int = 0,
    ) -> FusedLoss:
        """The teacher's rows, if any, are not looked at."""
        return fused_linear_cross_entropy(student_hidden_RD, student_head, labels_R)


def _joined(parts: Sequence[FusedLoss]) -> FusedLoss:
    """Of the rows of all parts in order, at least one."""
    sums = torch.stack([part.loss_sum for part in parts]).sum()
    per_row = [field.name for field in fields(FusedLoss) if field.name != "loss_sum"]
    return FusedLoss(loss_sum=sums, **{name: torch.cat([getattr(part, name) for part in parts]) for name in per_row})
