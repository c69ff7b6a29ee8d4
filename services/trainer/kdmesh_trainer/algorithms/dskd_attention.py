"""Dual-space distillation between two tokenizers, where attention finds which rows of the two go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from kdmesh.losses import FusedLoss, MixedTeacher, OutputHead, fused_linear_cross_entropy
from kdmesh.models.packing import moved
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.data_tokens import with_cross_entropy
from kdmesh_trainer.algorithms.dskd import lift, trained
from kdmesh_trainer.algorithms.projection import FollowingMap, logit_preserving_map
from kdmesh_trainer.algorithms.seam import LossRows, Setup, Terms
from kdmesh_trainer.data.encoding.sides import teacher_side


class AttendingDualSpaceKD(nn.Module):
    """kd_weight * (I + S + T) + ce_weight * cross-entropy; W the heads, h the hidden states, A and C trained.

    A row's tokens are the one at its position and the one that follows, each as its row of the head over the spread of
    that head. With q = C [tokens of the student's row] and k = [tokens of the teacher's row], both of 2 E numbers, and
    attention softmax(q k / sqrt(2 E)) within a sequence:
    I = cross-entropy of softmax(W_s sum_k attention A h_t) against the data's tokens: trains A and C.
    S = divergence of softmax(W_s h_s) from that distribution, which is a constant here.
    T = divergence of softmax(W_t sum_q attention B h_s), the other way round, from softmax(W_t h_t), for each row of
    the teacher: trains C and the student. B is as in DualSpaceKD, over the shared tokens.

    Source: Zhang et al. 2024 (DSKD with CMA), arXiv:2406.17328, with A and B as in 2025, arXiv:2504.11426, and C begun
    as what brings the student's head nearest to the teacher's.
    """

    def __init__(self, setup: Setup, *, trains_lift: bool = False) -> None:
        """`trains_lift`: B is trained, as in the paper of 2024."""
        super().__init__()
        assert setup.shared is not None  # the configuration's
        (teacher_head,) = setup.teacher_heads().values()
        student_shared = setup.student_head.selected(torch.from_numpy(setup.shared.student_ids).long())
        teacher_shared = teacher_head.selected(torch.from_numpy(setup.shared.teacher_ids).long())
        self._student_spread = float(setup.student_head.weight_VD.float().std())
        self._teacher_spread = float(teacher_head.weight_VD.float().std())
        # Tokens are rows of W, so what brings W_s nearest to W_t acts from the right.
        query_ED = logit_preserving_map(
            replace(teacher_shared, logit_scale=1.0), replace(student_shared, logit_scale=1.0), setup.device
        ).T
        query_ED = query_ED * (self._student_spread / self._teacher_spread)
        self.query = trained(torch.kron(torch.eye(2, dtype=query_ED.dtype, device=setup.device), query_ED.contiguous()))
        self.teacher_to_student = trained(logit_preserving_map(teacher_shared, student_shared, setup.device))
        self.student_to_teacher: nn.Parameter | None = None
        if trains_lift:
            self.student_to_teacher = trained(logit_preserving_map(student_shared, teacher_shared, setup.device))
        self._following = FollowingMap(setup.shared, setup.device)

    def forward(self, rows: LossRows, terms: Terms) -> FusedLoss:
        """See Algorithm; the divergences that are reported are those of S."""
        (target,) = rows.whole_targets()
        (teacher,) = target.teachers
        head, dtype = rows.head.detached(), self.query.dtype
        query_RK = linear(_tokens(rows.sequences, head, self._student_spread).to(dtype), self.query)
        key_AK = _tokens(teacher_side(rows.sequences), teacher.head, self._teacher_spread).to(dtype)
        value_AD = linear(teacher.hidden_RE.to(dtype), self.teacher_to_student)
        lift_ED = lift(self.student_to_teacher, self._following, head, teacher.head)
        value_RE = linear(rows.hidden_RD, lift_ED.to(rows.hidden_RD.dtype))
        parts = list(_rows_of_each(rows.sequences))
        in_student_RD = torch.cat([_attend(query_RK[own], key_AK[theirs], value_AD[theirs]) for own, theirs in parts])
        in_teacher_AE = torch.cat([_attend(key_AK[theirs], query_RK[own], value_RE[own]) for own, theirs in parts])
        imitation = fused_linear_cross_entropy(in_student_RD, head, rows.labels_R)
        projected = MixedTeacher(hidden_RE=in_student_RD.detach(), head=head, weight=1.0)
        labels_R = rows.labels_R if terms.ce_weight == 0 else None
        student_space = terms.compare(rows.hidden_RD, rows.head, [projected], labels_R)
        teacher_space = terms.compare(in_teacher_AE, teacher.head, [teacher], None)
        total = terms.kd_weight * imitation.loss_sum + student_space.loss_sum + teacher_space.loss_sum
        absent_0 = student_space.divergence_R[:0]  # would be against the attended teacher, which is not the teacher
        loss = replace(
            student_space,
            loss_sum=total,
            top1_agreement_R=absent_0,
            student_entropy_R=absent_0,
            teacher_entropy_R=absent_0,
            topk_overlap_R=absent_0,
        )
        return loss if terms.ce_weight == 0 else with_cross_entropy(loss, rows, terms)


def _tokens(sequences: tuple[TokenSequence, ...], head: OutputHead, spread: float) -> Tensor:
    """[R, 2 D] of every row: the token at its position and the next one, as rows of the head."""
    pairs = [np.stack([s.token_ids[s.positions], s.labels], axis=1) for s in sequences]
    pairs_R2 = moved(torch.from_numpy(np.concatenate(pairs).astype(np.int64)), head.weight_VD.device)
    return head.weight_VD[pairs_R2].flatten(1) / spread


def _rows_of_each(sequences: tuple[TokenSequence, ...]) -> Iterator[tuple[slice, slice]]:
    """Which of the student's rows and of the teacher's are each sequence's."""
    own = theirs = 0
    for sequence, teachers in zip(sequences, teacher_side(sequences), strict=True):
        yield slice(own, own + sequence.num_rows), slice(theirs, theirs + teachers.num_rows)
        own, theirs = own + sequence.num_rows, theirs + teachers.num_rows


def _attend(query_NK: Tensor, key_MK: Tensor, value_MD: Tensor) -> Tensor:
    """[N, D]"""
    attended: Tensor = scaled_dot_product_attention(query_NK[None, None], key_MK[None, None], value_MD[None, None])
    return attended[0, 0]
