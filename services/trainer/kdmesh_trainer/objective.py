"""What the student is trained to minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.losses import (
    Divergence,
    FusedLoss,
    MixedTeacher,
    OutputHead,
    SampledDivergence,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)
from kdmesh_trainer.head import Heads, Target
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows


class Objective(Protocol):
    """The loss of one micro-batch's rows."""

    def at(self, step: int) -> Objective:
        """What is minimised in optimizer step `step`, counted from 0."""
        ...

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        labels_R: Tensor,
        teacher: TeacherRows | PanelRows | None,
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
    """kd_weight * divergence(student, teacher) + ce_weight * cross-entropy, where a row's teacher may be a mixture."""

    divergence: Divergence | SampledDivergence
    temperature: float
    kd_weight: float
    ce_weight: float
    teacher_head: Heads
    numbers_at: Callable[[int], Mapping[str, float]] | None = None  # temperature and weights by step; None: constant
    with_entropies: bool = False
    top_k: int = 0  # compared tokens; 0 compares none

    def at(self, step: int) -> Distillation:
        """See Objective."""
        if self.numbers_at is None:
            return self
        now = self.numbers_at(step)
        return replace(self, temperature=now["temperature"], kd_weight=now["kd_weight"], ce_weight=now["ce_weight"])

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        labels_R: Tensor,
        teacher: TeacherRows | PanelRows | None,
        *,
        num_sampled: int = 0,
    ) -> FusedLoss:
        """The mix; without teacher rows there is nothing to learn from, so R must be 0."""
        if teacher is None:
            assert len(labels_R) == 0
            return fused_linear_cross_entropy(student_hidden_RD, student_head, labels_R)
        targets = self.teacher_head.targets(teacher)
        if (tokens_S := targets[0].tokens_S) is not None:
            (target,) = targets
            return self._over_shared_tokens(target, tokens_S, student_hidden_RD, student_head, labels_R)
        if targets[0].index_R is None:
            (target,) = targets
            return self._against(target, student_hidden_RD, student_head, labels_R, num_sampled)
        # The rows of one teacher after those of another, and then each in its place again.
        device = student_hidden_RD.device
        indices = [_index(target) for target in targets]
        parts = [
            self._against(
                target,
                student_hidden_RD.index_select(0, index_R.to(device)),
                student_head,
                labels_R[index_R.to(device)],
                int((index_R < num_sampled).sum()),
            )
            for target, index_R in zip(targets, indices, strict=True)
        ]
        return _joined(parts, order_R=torch.cat(indices).argsort().to(device))

    def _over_shared_tokens(
        self, target: Target, tokens_S: Tensor, student_hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor
    ) -> FusedLoss:
        """The divergence of the rows that have an answer, over the tokens that both know, and cross-entropy of all."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ce_weight > 0):
            whole = fused_linear_cross_entropy(student_hidden_RD, student_head, labels_R)
        index_R = _index(target).to(student_hidden_RD.device)
        answered = replace(self, ce_weight=0.0)._mixed(
            student_hidden_RD.index_select(0, index_R),
            student_head.selected(tokens_S),
            target.teachers,
            None,
            ce_weight=0.0,
        )
        return replace(
            answered,
            loss_sum=answered.loss_sum + self.ce_weight * whole.loss_sum,
            cross_entropy_R=whole.cross_entropy_R,
        )

    def _against(
        self, target: Target, student_hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor, num_sampled: int
    ) -> FusedLoss:
        """The loss of the rows of one target."""
        if num_sampled == 0 or self.ce_weight == 0:
            return self._mixed(student_hidden_RD, student_head, target.teachers, labels_R, ce_weight=self.ce_weight)
        weights = ((slice(0, num_sampled), 0.0), (slice(num_sampled, None), self.ce_weight))
        parts = [
            self._mixed(
                student_hidden_RD[rows],
                student_head,
                [replace(teacher, hidden_RE=teacher.hidden_RE[rows]) for teacher in target.teachers],
                labels_R[rows],
                ce_weight=weight,
            )
            for rows, weight in weights
            if len(labels_R[rows]) > 0
        ]
        return _joined(parts)

    def _mixed(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        teachers: Sequence[MixedTeacher],
        labels_R: Tensor | None,
        *,
        ce_weight: float,
    ) -> FusedLoss:
        first, *others = teachers
        is_sampled = isinstance(self.divergence, SampledDivergence)
        return fused_linear_divergence(
            student_hidden_RD,
            student_head,
            first.hidden_RE,
            first.head,
            divergence=self.divergence,
            mixed_with=others,
            temperature=self.temperature,
            # At another temperature cross-entropy costs a second softmax: only where it is learnt from.
            labels_R=labels_R if self.ce_weight > 0 or self.temperature == 1 or is_sampled else None,
            kd_weight=self.kd_weight,
            ce_weight=ce_weight,
            with_entropies=self.with_entropies,
            top_k=self.top_k,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy on the data's own tokens."""

    def at(self, step: int) -> CrossEntropy:
        """See Objective."""
        return self

    def __call__(
        self,
        student_hidden_RD: Tensor,
        student_head: OutputHead,
        labels_R: Tensor,
        teacher: TeacherRows | PanelRows | None,
        *,
        num_sampled: int = 0,
    ) -> FusedLoss:
        """The teacher's rows, if any, are not looked at."""
        return fused_linear_cross_entropy(student_hidden_RD, student_head, labels_R)


def _index(target: Target) -> Tensor:
    assert target.index_R is not None
    return target.index_R


def _joined(parts: Sequence[FusedLoss], *, order_R: Tensor | None = None) -> FusedLoss:
    """Of the rows of all parts, at least one, one after the other; `order_R` says where each row is found then."""

    def join(name: str) -> Tensor:
        values_R = torch.cat([getattr(part, name) for part in parts])
        return values_R if order_R is None or len(values_R) == 0 else values_R[order_R]

    sums = torch.stack([part.loss_sum for part in parts]).sum()
    per_row = [field.name for field in fields(FusedLoss) if field.name != "loss_sum"]
    return FusedLoss(loss_sum=sums, **{name: join(name) for name in per_row})
