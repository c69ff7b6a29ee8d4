"""The elementwise half of the fused loss, over a few rows of logits at a time so that they stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.losses.divergences import Divergence
from kdmesh.losses.head import OutputHead


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowValues:
    """What each row came to, in float32 (float64 with a float64 model)."""

    loss_R: Tensor  # what is minimised, but for the row's own weight
    divergence_R: Tensor  # [0] without a teacher
    cross_entropy_R: Tensor  # [0] without labels
    top1_agreement_R: Tensor  # [0] without a teacher


class RowMaths(Protocol):
    """Turns raw products (hidden @ weight.T, one matrix per head, student first) into values and a gradient."""

    def values(self) -> RowValues:
        """Of every row worked on so far."""
        ...

    def __call__(self, rows: slice, products: list[Tensor], gradient_CV: Tensor | None) -> None:
        """Work on `rows` of the batch: keep their values, overwrite their products.

        Writes d loss / d (student's product) to `gradient_CV`, if there is one.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What each row adds to the loss: kd_weight * divergence + ce_weight * cross-entropy."""

    divergence: Divergence
    temperature: float
    kd_weight: float
    ce_weight: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudentSide:
    """The student's head, and what lies between the gradient of its logits and that of its products."""

    head: OutputHead
    token_weight_R: Tensor | None
    bias_gradient_V: Tensor | None  # added to, where the bias wants a gradient

    def store_gradient(self, rows: slice, dlogits_CV: Tensor, logits_CV: Tensor, gradient_CV: Tensor) -> None:
        """Write d loss / d product to `gradient_CV`. Overwrites `dlogits_CV` and `logits_CV`."""
        cap, scale = self.head.logit_softcap, self.head.logit_scale
        if cap is not None:  # the derivative of tanh is 1 - tanh^2
            dlogits_CV.addcmul_(dlogits_CV, logits_CV.div_(cap).square_(), value=-1)
        if self.token_weight_R is not None:
            dlogits_CV.mul_(self.token_weight_R[rows, None] * scale)
        elif scale != 1:
            dlogits_CV.mul_(scale)
        if self.bias_gradient_V is not None:
            self.bias_gradient_V.add_(dlogits_CV.sum(0))
        gradient_CV.copy_(dlogits_CV)


class CrossEntropyRows:
    """Cross-entropy of the student against labels."""

    def __init__(self, student: StudentSide, labels_R: Tensor, *, tile_CV: Tensor) -> None:
        """`tile_CV` has the most rows that a call may bring, and the dtype to compute in; it becomes scratch."""
        self._cross_entropy_R = tile_CV.new_empty(len(labels_R))
        self._student = student
        self._labels_R = labels_R
        self._scratch_CV = tile_CV

    def __call__(self, rows: slice, products: list[Tensor], gradient_CV: Tensor | None) -> None:
        (product_CV,) = products
        label_C1 = self._labels_R[rows, None]
        logits_CV = _logits(product_CV, self._student.head)
        log_q_CV = torch.log_softmax(logits_CV, -1, out=self._scratch_CV[: len(logits_CV)])
        self._cross_entropy_R[rows] = _cross_entropy(log_q_CV, label_C1)
        if gradient_CV is not None:
            dlogits_CV = _subtract_at(log_q_CV.exp_(), label_C1, 1.0)  # q - onehot
            self._student.store_gradient(rows, dlogits_CV, logits_CV, gradient_CV)

    def values(self) -> RowValues:
        """Cross-entropy alone."""
        values_R = self._cross_entropy_R
        return RowValues(
            loss_R=values_R,
            divergence_R=values_R.new_empty(0),
            cross_entropy_R=values_R,
            top1_agreement_R=values_R.new_empty(0),
        )


class DivergenceRows:
    """A divergence of the student from the teacher, with cross-entropy against labels mixed in."""

    def __init__(
        self,
        student: StudentSide,
        teacher_head: OutputHead,
        mix: Mix,
        labels_R: Tensor | None,
        *,
        num_rows: int,
        tile_CV: Tensor,
    ) -> None:
        """`tile_CV` has the most rows that a call may bring, and the dtype to compute in; it becomes scratch."""
        self._divergence_R = tile_CV.new_empty(num_rows)
        self._cross_entropy_R = tile_CV.new_empty(0 if labels_R is None else num_rows)
        self._top1_agreement_R = tile_CV.new_empty(num_rows)
        self._student = student
        self._teacher_head = teacher_head
        self._mix = mix
        self._labels_R = labels_R
        self._scratch = tile_CV, torch.empty_like(tile_CV), torch.empty_like(tile_CV)

    def __call__(self, rows: slice, products: list[Tensor], gradient_CV: Tensor | None) -> None:
        log_q_CV, log_p_CV, q_CV = (scratch_CV[: rows.stop - rows.start] for scratch_CV in self._scratch)
        logits_CV = _logits(products[0], self._student.head)
        self._log_softmax(logits_CV, spare_CV=q_CV, out=log_q_CV)
        self._log_softmax(_logits(products[1], self._teacher_head), spare_CV=q_CV, out=log_p_CV)
        self._top1_agreement_R[rows] = _top1_agreement(log_q_CV, log_p_CV)
        if self._labels_R is not None and self._mix.temperature == 1:
            self._cross_entropy_R[rows] = _cross_entropy(log_q_CV, self._labels_R[rows, None])
        torch.exp(log_q_CV, out=q_CV)  # before the divergence, which may overwrite log q
        self._divergence_R[rows], h_CV = self._mix.divergence(log_q_CV, log_p_CV)
        dlogits_CV = self._dlogits(h_CV, q_CV)
        if self._labels_R is not None:
            self._mix_in_labels(rows, self._labels_R[rows, None], logits_CV, dlogits_CV, spare_CV=log_q_CV)
        if gradient_CV is not None:
            self._student.store_gradient(rows, dlogits_CV, logits_CV, gradient_CV)

    def values(self) -> RowValues:
        """The divergence, mixed with cross-entropy where there are labels."""
        loss_R = self._divergence_R * self._mix.kd_weight
        if self._labels_R is not None:
            loss_R += self._cross_entropy_R * self._mix.ce_weight
        return RowValues(
            loss_R=loss_R,
            divergence_R=self._divergence_R,
            cross_entropy_R=self._cross_entropy_R,
            top1_agreement_R=self._top1_agreement_R,
        )

    def _log_softmax(self, logits_CV: Tensor, *, spare_CV: Tensor, out: Tensor) -> None:
        if self._mix.temperature != 1:
            logits_CV = torch.mul(logits_CV, 1 / self._mix.temperature, out=spare_CV)
        torch.log_softmax(logits_CV, -1, out=out)

    def _dlogits(self, h_CV: Tensor, q_CV: Tensor) -> Tensor:
        """In place of q: kd_weight * (h - q sum(h)) / temperature, and q's share of cross-entropy where q is it."""
        mix = self._mix
        weight = mix.kd_weight / mix.temperature
        factor_C1 = h_CV.sum(-1, keepdim=True) * weight
        if mix.temperature == 1:
            factor_C1 -= mix.ce_weight
        if weight != 1:
            h_CV = h_CV * weight
        return torch.addcmul(h_CV, q_CV, factor_C1, value=-1, out=q_CV)

    def _mix_in_labels(
        self, rows: slice, label_C1: Tensor, logits_CV: Tensor, dlogits_CV: Tensor, *, spare_CV: Tensor
    ) -> None:
        """Add the rest of cross-entropy, which knows no temperature."""
        if self._mix.temperature != 1:
            log_q_CV = torch.log_softmax(logits_CV, -1, out=spare_CV)
            self._cross_entropy_R[rows] = _cross_entropy(log_q_CV, label_C1)
            dlogits_CV.add_(log_q_CV.exp_(), alpha=self._mix.ce_weight)
        _subtract_at(dlogits_CV, label_C1, self._mix.ce_weight)


def _logits(product_CV: Tensor, head: OutputHead) -> Tensor:
    """The head's logits, in place of the product."""
    if head.bias_V is not None:
        product_CV.add_(head.bias_V)
    if head.logit_softcap is not None:
        return product_CV.mul_(head.logit_scale / head.logit_softcap).tanh_().mul_(head.logit_softcap)
    return product_CV if head.logit_scale == 1 else product_CV.mul_(head.logit_scale)


def _cross_entropy(log_q_CV: Tensor, label_C1: Tensor) -> Tensor:
    return -log_q_CV.gather(-1, label_C1)[:, 0]


def _subtract_at(matrix_CV: Tensor, column_C1: Tensor, amount: float) -> Tensor:
    """`matrix_CV` less `amount` at one column per row, in place."""
    return matrix_CV.scatter_add_(-1, column_C1, torch.full_like(column_C1, -amount, dtype=matrix_CV.dtype))


def _top1_agreement(log_q_CV: Tensor, log_p_CV: Tensor) -> Tensor:
    """1 where the teacher's favourite is the student's too, or one of several that tie."""
    return log_q_CV.gather(-1, _argmax(log_p_CV))[:, 0] == log_q_CV.amax(-1)


def _argmax(matrix_CV: Tensor) -> Tensor:
    """[C, 1]: the first column that holds the row's maximum.

    By blocks where V allows: amax is vectorised on a CPU, argmax is not and takes ten times as long.
    """
    num_rows, width = matrix_CV.shape
    block = gcd(width, 128)
    blocks_CKB = matrix_CV.view(num_rows, width // block, block)
    best_C1 = blocks_CKB.amax(-1).argmax(-1, keepdim=True)
    inside_CB = blocks_CKB.gather(1, best_C1[..., None].expand(-1, -1, block))[:, 0]
    return best_C1 * block + inside_CB.argmax(-1, keepdim=True)
