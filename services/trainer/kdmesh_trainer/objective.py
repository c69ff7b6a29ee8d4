"""What the student is trained to minimise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kdmesh.losses import (
    Divergence,
    FusedLoss,
    OutputHead,
    Workspace,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)
from kdmesh_trainer.head import TeacherHead
from kdmesh_trainer.sources.batches import TeacherRows


class Objective(Protocol):
    """The loss of one micro-batch's rows."""

    def __call__(
        self, student_hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor, teacher: TeacherRows | None
    ) -> FusedLoss:
        """Summed over rows, never averaged.

        Args:
            teacher: rows of the same positions; None where the source asks no teacher, or R is 0.
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
    workspace: Workspace | None
    with_entropies: bool = False

    def __call__(
        self, student_hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor, teacher: TeacherRows | None
    ) -> FusedLoss:
        """The mix; without teacher rows there is nothing to learn from, so R must be 0."""
        if teacher is None:
            assert len(labels_R) == 0
            return fused_linear_cross_entropy(student_hidden_RD, student_head, labels_R, workspace=self.workspace)
        return fused_linear_divergence(
            student_hidden_RD,
            student_head,
            teacher.rows_RD.to(student_hidden_RD.device),
            self.teacher_head.at(teacher.weight_version),
            divergence=self.divergence,
            temperature=self.temperature,
            # At another temperature cross-entropy costs a second softmax: only where it is learnt from.
            labels_R=labels_R if self.ce_weight > 0 or self.temperature == 1 else None,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            with_entropies=self.with_entropies,
            workspace=self.workspace,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy on the data's own tokens."""

    workspace: Workspace | None

    def __call__(
        self, student_hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor, teacher: TeacherRows | None
    ) -> FusedLoss:
        """The teacher's rows, if any, are not looked at."""
        return fused_linear_cross_entropy(student_hidden_RD, student_head, labels_R, workspace=self.workspace)
