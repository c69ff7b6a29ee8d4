"""The elementwise half of the fused loss, a few rows of logits at a time so that they stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.losses.divergences import Divergence, forward_kl
from kdmesh.losses.head import OutputHead
from kdmesh.losses.sampled import SampledDivergence
from kdmesh.losses.top1 import Top1Agreement
from kdmesh.losses.topk import TopKOverlap


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowValues:
    """What each row came to, in float32 (float64 with a float64 model)."""

    loss_R: Tensor  # what is minimised, but for the row's own weight
    divergence_R: Tensor  # [0] without a teacher
    cross_entropy_R: Tensor  # [0] without labels
    top1_agreement_R: Tensor  # [0] without a teacher
    student_entropy_R: Tensor  # [0] unless asked for
    teacher_entropy_R: Tensor  # [0] unless asked for
    topk_overlap_R: Tensor  # [0] unless asked for

    def told(self) -> tuple[Tensor, ...]:
        """What a FusedLoss tells of each row, in the order of its fields."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "loss_R")

    def part(self, rows: slice) -> RowValues:
        """Some of the rows."""
        return RowValues(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[RowValues], *, like: Tensor) -> RowValues:
        """Of the rows of all parts in order; `like` gives dtype and device where there is none."""

        def join(pick: Callable[[RowValues], Tensor]) -> Tensor:
            return torch.cat([like.new_empty(0), *map(pick, parts)])

        return cls(
            loss_R=join(lambda part: part.loss_R),
            divergence_R=join(lambda part: part.divergence_R),
            cross_entropy_R=join(lambda part: part.cross_entropy_R),
            top1_agreement_R=join(lambda part: part.top1_agreement_R),
            student_entropy_R=join(lambda part: part.student_entropy_R),
            teacher_entropy_R=join(lambda part: part.teacher_entropy_R),
            topk_overlap_R=join(lambda part: part.topk_overlap_R),
        )


class RowMaths(Protocol):
    """Turns products (hidden @ weight.T, one matrix per head, student first) into values and a gradient.

    A block of rows comes tile by tile, in order. For one thread at a time.
    """

    def tile(self, rows: slice, products: Sequence[Tensor], gradient_CV: Tensor | None) -> None:
        """Work on `rows` of the batch; the products become logits in place.

        Fills `gradient_CV`, if there is one, with d loss / d (student's product).
        """
        ...

    def end_block(self, products: Sequence[Tensor]) -> RowValues:
        """Values of the tiles since the last call, whose products these are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What each row adds to the loss: kd_weight * divergence + ce_weight * cross-entropy."""

    divergence: Divergence | SampledDivergence
    temperature: float
    kd_weight: float
    ce_weight: float
    with_entropies: bool = False
    top_k: int = 0  # compared tokens of each row; 0 compares none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudentSide:
    """The student's head, and what lies between the gradient of its logits and that of its products."""

    head: OutputHead
    token_weight_R: Tensor | None
    bias_gradient_V: Tensor | None  # added to, where the bias wants a gradient

    def store_gradient(
        self, rows: slice, dlogits_CV: Tensor, logits_CV: Tensor, *, spare_CV: Tensor, out_CV: Tensor
    ) -> None:
        """Write d loss / d product to `out_CV`, which may be `dlogits_CV`. Overwrites that and `spare_CV`."""
        cap, scale = self.head.logit_softcap, self.head.logit_scale
        if cap is not None:  # the derivative of tanh is 1 - tanh^2
            dlogits_CV.addcmul_(dlogits_CV, torch.mul(logits_CV, 1 / cap, out=spare_CV).square_(), value=-1)
        if self.token_weight_R is not None:
            dlogits_CV.mul_(self.token_weight_R[rows, None] * scale)
        elif scale != 1:
            dlogits_CV.mul_(scale)
        if self.bias_gradient_V is not None:
            self.bias_gradient_V.add_(dlogits_CV.sum(0))
        if out_CV is not dlogits_CV:
            out_CV.copy_(dlogits_CV)


class CrossEntropyRows:
    """Cross-entropy of the student against labels."""

    def __init__(self, student: StudentSide, labels_R: Tensor, *, tile_CV: Tensor) -> None:
        """`tile_CV` has the most rows that a tile may have and the dtype to compute in; it becomes scratch."""
        self._student = student
        self._labels_R = labels_R
        self._scratch = tile_CV, torch.empty_like(tile_CV)
        self._cross_entropy: list[Tensor] = []

    def tile(self, rows: slice, products: Sequence[Tensor], gradient_CV: Tensor | None) -> None:
        """Products are the student's."""
        (logits_CV,) = products
        become_logits(logits_CV, self._student.head)
        log_q_CV, spare_CV = _cut(self._scratch, len(logits_CV))
        torch.log_softmax(logits_CV, -1, out=log_q_CV)
        label_C1 = self._labels_R[rows, None]
        self._cross_entropy.append(-log_q_CV.gather(-1, label_C1))
        if gradient_CV is not None:
            dlogits_CV = _subtract_at(log_q_CV.exp_(), label_C1, 1.0)  # q - onehot
            self._student.store_gradient(rows, dlogits_CV, logits_CV, spare_CV=spare_CV, out_CV=gradient_CV)

    def end_block(self, products: Sequence[Tensor]) -> RowValues:
        """Cross-entropy alone."""
        cross_entropy_R = torch.cat(self._cross_entropy)[:, 0]
        self._cross_entropy.clear()
        absent_0 = cross_entropy_R[:0]
        return RowValues(
            loss_R=cross_entropy_R,
            divergence_R=absent_0,
            cross_entropy_R=cross_entropy_R,
            top1_agreement_R=absent_0,
            student_entropy_R=absent_0,
            teacher_entropy_R=absent_0,
            topk_overlap_R=absent_0,
        )


class DivergenceRows:
    """A divergence of the student from the teacher, with cross-entropy against labels mixed in."""

    def __init__(
        self, student: StudentSide, teacher_head: OutputHead, mix: Mix, labels_R: Tensor | None, *, tile_CV: Tensor
    ) -> None:
        """`tile_CV` has the most rows that a tile may have and the dtype to compute in; it becomes scratch."""
        self._student = student
        self._teacher_head = teacher_head
        self._mix = mix
        self._labels_R = labels_R
        self._scratch = tile_CV, torch.empty_like(tile_CV), torch.empty_like(tile_CV)
        self._top1 = Top1Agreement(tile_CV.shape[1], tile_CV.device)
        self._topk = TopKOverlap(mix.top_k, tile_CV.shape[1], tile_CV.device) if mix.top_k else None
        self._divergence: list[Tensor] = []
        self._cross_entropy: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def tile(self, rows: slice, products: Sequence[Tensor], gradient_CV: Tensor | None) -> None:
        """Products are the student's, then the teacher's."""
        logits_CV, *teacher_products = products
        log_q_CV, log_p_CV, q_CV = _cut(self._scratch, len(logits_CV))
        # One side after the other: what is worked on is still in the cache.
        become_logits(logits_CV, self._student.head)
        self._top1.note_student(logits_CV)
        if self._topk is not None:
            self._topk.note_student(logits_CV)
        self._log_softmax(logits_CV, spare_CV=q_CV, out=log_q_CV)
        teacher_logits_CV = self._teacher_logits(teacher_products)
        self._top1.note_teacher(teacher_logits_CV)
        if self._topk is not None:
            self._topk.note_teacher(teacher_logits_CV)
        self._log_softmax(teacher_logits_CV, spare_CV=q_CV, out=log_p_CV)
        if self._labels_R is not None and self._mix.temperature == 1:
            self._cross_entropy.append(-log_q_CV.gather(-1, self._labels_R[rows, None]))
        torch.exp(log_q_CV, out=q_CV)  # before the divergence, which may overwrite log q
        if self._mix.with_entropies:
            self._entropies.append(_entropies(q_CV, log_q_CV, log_p_CV))
        divergence_C, h_CV = self._compare(rows, log_q_CV, log_p_CV)
        self._divergence.append(divergence_C)
        # Straight to where it belongs, unless it is rounded on the way.
        target_CV = q_CV if gradient_CV is None or gradient_CV.dtype is not q_CV.dtype else gradient_CV
        dlogits_CV = self._dlogits(h_CV, q_CV, out=target_CV)
        if self._labels_R is not None:
            self._mix_in_labels(self._labels_R[rows, None], logits_CV, dlogits_CV, spare_CV=log_q_CV)
        if gradient_CV is not None:
            self._student.store_gradient(rows, dlogits_CV, logits_CV, spare_CV=log_q_CV, out_CV=gradient_CV)

    def end_block(self, products: Sequence[Tensor]) -> RowValues:
        """The divergence, mixed with cross-entropy where there are labels."""
        divergence_R = torch.cat(self._divergence)
        self._divergence.clear()
        cross_entropy_R = divergence_R[:0]
        loss_R = divergence_R * self._mix.kd_weight
        if self._labels_R is not None:
            cross_entropy_R = torch.cat(self._cross_entropy)[:, 0]
            self._cross_entropy.clear()
            loss_R += cross_entropy_R * self._mix.ce_weight
        entropies_2R = torch.cat(self._entropies or [loss_R.new_empty(2, 0)], dim=1)
        self._entropies.clear()
        logits_BV, teacher_logits_BV, *_ = products
        return RowValues(
            loss_R=loss_R,
            divergence_R=divergence_R,
            cross_entropy_R=cross_entropy_R,
            top1_agreement_R=self._top1.end_block(logits_BV, teacher_logits_BV),
            student_entropy_R=entropies_2R[0],
            teacher_entropy_R=entropies_2R[1],
            topk_overlap_R=loss_R[:0] if self._topk is None else self._topk.end_block(logits_BV, teacher_logits_BV),
        )

    def _teacher_logits(self, products: Sequence[Tensor]) -> Tensor:
        """What the teacher's products become, in the memory of the first."""
        (logits_CV,) = products
        become_logits(logits_CV, self._teacher_head)
        return logits_CV

    def _compare(self, rows: slice, log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
        divergence = self._mix.divergence
        if not isinstance(divergence, SampledDivergence):
            return divergence(log_q_CV, log_p_CV)
        assert self._labels_R is not None
        return divergence.function(log_q_CV, log_p_CV, self._labels_R[rows, None])

    def _log_softmax(self, logits_CV: Tensor, *, spare_CV: Tensor, out: Tensor) -> None:
        if self._mix.temperature != 1:
            logits_CV = torch.mul(logits_CV, 1 / self._mix.temperature, out=spare_CV)
        torch.log_softmax(logits_CV, -1, out=out)

    def _dlogits(self, h_CV: Tensor, q_CV: Tensor, *, out: Tensor) -> Tensor:
        """kd_weight * (h - q sum(h)) / temperature, and q's share of cross-entropy where q is it."""
        mix = self._mix
        weight = mix.kd_weight / mix.temperature
        q_weight = mix.ce_weight if mix.temperature == 1 else 0.0
        weighted_h_CV = h_CV if weight == 1 else h_CV * weight
        if mix.divergence is forward_kl:  # h is -p, so that its sum is known: a tenth of all the work here is saved
            return torch.add(weighted_h_CV, q_CV, alpha=weight + q_weight, out=out)
        factor_C1 = q_weight - weight * h_CV.sum(-1, keepdim=True)
        return torch.addcmul(weighted_h_CV, q_CV, factor_C1, out=out)

    def _mix_in_labels(self, label_C1: Tensor, logits_CV: Tensor, dlogits_CV: Tensor, *, spare_CV: Tensor) -> None:
        """Add the rest of cross-entropy, which knows no temperature."""
        if self._mix.temperature != 1:
            log_q_CV = torch.log_softmax(logits_CV, -1, out=spare_CV)
            self._cross_entropy.append(-log_q_CV.gather(-1, label_C1))
            if self._mix.ce_weight != 0:
                dlogits_CV.add_(log_q_CV.exp_(), alpha=self._mix.ce_weight)
        if self._mix.ce_weight != 0:
            _subtract_at(dlogits_CV, label_C1, self._mix.ce_weight)


def _entropies(q_CV: Tensor, log_q_CV: Tensor, log_p_CV: Tensor) -> Tensor:
    """[2, C]: of the student and of the teacher."""
    student_C = torch.linalg.vecdot(q_CV, log_q_CV)
    return -torch.stack([student_C, torch.linalg.vecdot(log_p_CV.exp(), log_p_CV)])


def become_logits(product_CV: Tensor, head: OutputHead) -> None:
    """What the head does after its product with the hidden states, in place."""
    if head.bias_V is not None:
        product_CV.add_(head.bias_V)
    if head.logit_softcap is not None:
        product_CV.mul_(head.logit_scale / head.logit_softcap).tanh_().mul_(head.logit_softcap)
    elif head.logit_scale != 1:
        product_CV.mul_(head.logit_scale)


def _cut(scratch: tuple[Tensor, ...], num_rows: int) -> tuple[Tensor, ...]:
    """The first `num_rows` of each."""
    return scratch if len(scratch[0]) == num_rows else tuple(tile_CV[:num_rows] for tile_CV in scratch)


def _subtract_at(matrix_CV: Tensor, column_C1: Tensor, amount: float) -> Tensor:
    """`matrix_CV` less `amount` at one column per row, in place."""
    return matrix_CV.scatter_add_(-1, column_C1, torch.full_like(column_C1, -amount, dtype=matrix_CV.dtype))
