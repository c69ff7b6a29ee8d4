"""Dual-space distillation: student and teacher are compared through one head, once in the space of each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kdmesh.losses import (
    FusedLoss,
    MixedTeacher,
    OutputHead,
    fused_linear_cross_entropy,
    fused_linear_divergence,
    likeliest_tokens,
)
from kdmesh.models.packing import moved
from kdmesh_trainer.algorithms.data_tokens import with_cross_entropy
from kdmesh_trainer.algorithms.projection import FollowingMap, logit_preserving_map
from kdmesh_trainer.algorithms.seam import LossRows, Setup, Terms

_NO_TOKEN = -1


class DualSpaceKD(nn.Module):
    """kd_weight * (I + S + T) + ce_weight * cross-entropy, with W the heads, h the hidden states, and A trained.

    I = cross-entropy of softmax(W_s A h_t) against the teacher's likeliest token: trains A.
    S = divergence of softmax(W_s h_s) from softmax(W_s A h_t), here a constant, on rows where the two of I agree.
    T = divergence of softmax(W_t B h_s) from softmax(W_t h_t).

    W_s is the student's head as it is in this step, a constant in I. A begins as the map that keeps logits. B is that
    map in every step, pinv(W_t) W_s, a constant, so that T is about the student's own logits; or it only begins as such
    and is trained, and then nothing holds the student's head to what B makes of its hidden states. With another
    tokenizer I, S and T are of the rows that the teacher answers; there is no I and no S where the teacher's likeliest
    token is not one of the student's.

    Source: Zhang et al. 2025 (DSKD with ETA), arXiv:2504.11426; B is trained in that of 2024, arXiv:2406.17328. Every
    row counts alike, where KDFlow divides S by the rows that agree in a micro-batch.
    """

    def __init__(self, setup: Setup, *, trains_lift: bool = False) -> None:
        """`trains_lift`: B is trained."""
        super().__init__()
        (teacher_head,) = setup.teacher_heads().values()
        student_head = setup.student_head
        self._student_of: Tensor | None = None  # the student's token by the teacher's; None: they are the same
        if setup.shared is not None:
            student_S = torch.from_numpy(setup.shared.student_ids).long()
            teacher_S = torch.from_numpy(setup.shared.teacher_ids).long()
            student_of_V = torch.full((teacher_head.vocabulary_size,), _NO_TOKEN)
            student_of_V[teacher_S] = student_S
            self._student_of = student_of_V.to(setup.device)
            student_head, teacher_head = student_head.selected(student_S), teacher_head.selected(teacher_S)
        self.teacher_to_student = trained(logit_preserving_map(teacher_head, student_head, setup.device))
        self.student_to_teacher: nn.Parameter | None = None
        if trains_lift:
            self.student_to_teacher = trained(logit_preserving_map(student_head, teacher_head, setup.device))
        self._following = FollowingMap(setup.shared, setup.device)

    def forward(self, rows: LossRows, terms: Terms) -> FusedLoss:
        """See Algorithm."""
        (target,) = rows.whole_targets()
        (teacher,) = target.teachers
        student_AD, labels_A = rows.hidden_RD, rows.labels_R
        if target.index_R is not None:
            index_A = moved(target.index_R, student_AD.device)
            student_AD, labels_A = student_AD.index_select(0, index_A), labels_A[index_A]
        head = rows.head.detached()
        projected_AD = linear(teacher.hidden_RE.to(self.teacher_to_student.dtype), self.teacher_to_student)
        imitation, agrees_A = self._imitation(projected_AD, head, teacher)
        in_student = terms.compare(
            student_AD,
            rows.head,
            [MixedTeacher(hidden_RE=projected_AD.detach(), head=head, weight=1.0)],
            labels_A if terms.ce_weight == 0 else None,
            token_weight_R=agrees_A,
        )
        lift_ED = lift(self.student_to_teacher, self._following, head, teacher.head)
        in_teacher = terms.compare(linear(student_AD, lift_ED.to(student_AD.dtype)), teacher.head, [teacher], None)
        loss = replace(
            in_student,
            loss_sum=terms.kd_weight * imitation + in_student.loss_sum + in_teacher.loss_sum,
            divergence_R=in_student.divergence_R * agrees_A + in_teacher.divergence_R,
            # All three like the same token best: less often than the student and the teacher do.
            top1_agreement_R=in_student.top1_agreement_R * agrees_A,
            teacher_entropy_R=in_teacher.teacher_entropy_R,
            topk_overlap_R=in_student.topk_overlap_R[:0],  # would be with the projected teacher
        )
        is_whole = target.index_R is None
        return loss if terms.ce_weight == 0 and is_whole else with_cross_entropy(loss, rows, terms)

    def _imitation(self, projected_AD: Tensor, head: OutputHead, teacher: MixedTeacher) -> tuple[Tensor, Tensor]:
        """I summed over rows, and [A] 1 where the projected teacher prefers what the teacher does, else 0."""
        if self._student_of is None:
            imitation = fused_linear_divergence(
                projected_AD, head, teacher.hidden_RE, teacher.head, divergence=_likeliest_cross_entropy
            )
            return imitation.loss_sum, imitation.top1_agreement_R
        preferred_A = self._student_of[likeliest_tokens(teacher.hidden_RE, teacher.head)]
        is_known_A = preferred_A != _NO_TOKEN
        imitated = fused_linear_cross_entropy(
            projected_AD, head, preferred_A.clamp(min=0), token_weight_R=is_known_A.to(projected_AD.dtype)
        )
        # Equal to a token that is not there is nothing.
        agrees_A = likeliest_tokens(projected_AD.detach(), head) == preferred_A
        return imitated.loss_sum, agrees_A.to(imitated.cross_entropy_R.dtype)


def lift(own: Tensor | None, following: FollowingMap, student: OutputHead, teacher: OutputHead) -> Tensor:
    """[E, D] B: a matrix of its own where that is trained, else of the two heads."""
    return following.between(student, teacher) if own is None else own


def _likeliest_cross_entropy(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy against the teacher's likeliest token, as a `Divergence`."""
    best_C1 = log_p_CV.argmax(-1, keepdim=True)
    value_C = -log_q_CV.gather(-1, best_C1)[:, 0]
    return value_C, log_q_CV.zero_().scatter_(-1, best_C1, -1.0)


def trained(matrix: Tensor) -> nn.Parameter:
    """A parameter that begins as `matrix`, in the element type that the student is trained in."""
    return nn.Parameter(matrix.to("cpu", torch.float32))
