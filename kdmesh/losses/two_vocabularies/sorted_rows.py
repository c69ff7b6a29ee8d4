"""Compares distributions over two vocabularies: token by token where both have it, else rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdmesh.losses.divergences import jensen_shannon
from kdmesh.losses.head import OutputHead
from kdmesh.losses.rows import RowValues, StudentSide, become_logits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matched:
    """The tokens that both vocabularies have; int64, on the device of the rows."""

    student_M: Tensor
    teacher_M: Tensor  # in the same order
    _others: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False)  # by side and vocabulary size

    @classmethod
    def nothing(cls, device: torch.device) -> Matched:
        """Two vocabularies of which nothing is known."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return cls(student_M=none, teacher_M=none)

    def student_others(self, vocabulary_size: int) -> Tensor:
        """The student's tokens below `vocabulary_size` that are none of these, ascending.

        A GPU is waited for to find them, and only the first time.
        """
        return self._found("student", self.student_M, vocabulary_size)

    def teacher_others(self, vocabulary_size: int) -> Tensor:
        """As student_others."""
        return self._found("teacher", self.teacher_M, vocabulary_size)

    def _found(self, side: str, tokens_M: Tensor, vocabulary_size: int) -> Tensor:
        if len(tokens_M) == 0:
            return torch.arange(vocabulary_size, device=tokens_M.device)
        if (side, vocabulary_size) not in self._others:
            is_other_V = torch.ones(vocabulary_size, dtype=torch.bool, device=tokens_M.device)
            is_other_V[tokens_M] = False
            self._others[side, vocabulary_size] = is_other_V.nonzero()[:, 0]
        return self._others[side, vocabulary_size]


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridWeights:
    """How both terms are weighted."""

    beta: float  # of the teacher in the mixture of the matched term
    matched: float
    unmatched: float


class HybridRows:
    """matched * JS(P, Q) over the tokens that both have + unmatched * sum of |P - Q| over the others, each side sorted.

    P and Q are the distributions times a factor of each row. The shorter vocabulary is continued with zeros.

    Scratch for a tile of C rows, beyond the logits: about six matrices of each vocabulary, sorting's int64 order
    included.
    """

    def __init__(
        self,
        student: StudentSide,
        teacher_head: OutputHead,
        matched: Matched,
        weights: HybridWeights,
        factors: tuple[Tensor, Tensor],
        slope_R: Tensor,
    ) -> None:
        """
        Args:
            factors: [R] logarithms of the student's and of the teacher's.
            slope_R: becomes the derivative by the student's.
        """
        self._student = student
        self._teacher_head = teacher_head
        self._weights = weights
        self._matched = matched
        self._own_U = matched.student_others(student.head.vocabulary_size)
        self._their_U = matched.teacher_others(teacher_head.vocabulary_size)
        self._factors = factors
        self._slope_R = slope_R
        self._values: list[Tensor] = []

    def tile(self, rows: slice, products: Sequence[Tensor], gradient_CV: Tensor | None) -> None:
        """Products are the student's, then the teacher's."""
        logits_CV, teacher_logits_CW = products
        become_logits(logits_CV, self._student.head)
        become_logits(teacher_logits_CW, self._teacher_head)
        log_q_CV = logits_CV.log_softmax(-1)
        own_C1, their_C1 = (factor_R[rows, None].to(log_q_CV.dtype) for factor_R in self._factors)
        log_Q_CV = log_q_CV + own_C1
        log_P_CW = teacher_logits_CW.log_softmax(-1).add_(their_C1)
        value_C, h_CM = jensen_shannon(
            log_Q_CV.index_select(-1, self._matched.student_M),
            log_P_CW.index_select(-1, self._matched.teacher_M),
            beta=self._weights.beta,
        )
        rank_value_C, h_CU = _by_rank(
            log_Q_CV.index_select(-1, self._own_U).exp_(), log_P_CW.index_select(-1, self._their_U).exp_()
        )
        self._values.append(self._weights.matched * value_C + self._weights.unmatched * rank_value_C)
        h_CV = log_Q_CV
        h_CV.index_copy_(-1, self._matched.student_M, h_CM.mul_(self._weights.matched))
        h_CV.index_copy_(-1, self._own_U, h_CU.mul_(self._weights.unmatched))
        sum_C1 = h_CV.sum(-1, keepdim=True)
        self._slope_R[rows] = sum_C1[:, 0]
        if gradient_CV is not None:
            dlogits_CV = h_CV.addcmul_(log_q_CV.exp_(), sum_C1, value=-1)
            self._student.store_gradient(rows, dlogits_CV, logits_CV, spare_CV=log_q_CV, out_CV=gradient_CV)

    def end_block(self, products: Sequence[Tensor]) -> RowValues:
        """The divergence alone: there is no likeliest token that both must have."""
        divergence_R = torch.cat(self._values)
        self._values.clear()
        absent_0 = divergence_R[:0]
        return RowValues(
            loss_R=divergence_R,
            divergence_R=divergence_R,
            cross_entropy_R=absent_0,
            top1_agreement_R=absent_0,
            student_entropy_R=absent_0,
            teacher_entropy_R=absent_0,
            topk_overlap_R=absent_0,
        )


def _by_rank(q_CU: Tensor, p_CW: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of |q - p|, both in descending order, and its derivative by log q with every entry free."""
    q_CU, order_CU = q_CU.sort(-1, descending=True)
    p_CW = p_CW.sort(-1, descending=True).values
    num_own, num_their = q_CU.shape[1], p_CW.shape[1]
    both = min(num_own, num_their)
    gap_CU = q_CU.clone()
    gap_CU[:, :both] -= p_CW[:, :both]
    value_C = gap_CU.abs().sum(-1) + p_CW[:, both:].sum(-1)
    return value_C, q_CU.scatter(-1, order_CU, gap_CU.sign_().mul_(q_CU))
