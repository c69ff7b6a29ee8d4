"""Output head and divergence in one differentiable step that never builds a [R, V] matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdmesh.losses.divergences import Divergence
from kdmesh.losses.head import OutputHead


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FusedLoss:
    """A summed loss, and per-row values for reports.

    The per-row tensors carry no gradient. One that the call had no means to know (no
    teacher, no labels) is empty, shape [0]: it adds nothing to a sum.
    """

    loss_sum: Tensor  # [] float32, differentiable: sum over rows of weight * (kd_weight * D + ce_weight * CE)
    divergence_R: Tensor  # [R] float32, nats, unweighted; [0] without a teacher
    cross_entropy_R: Tensor  # [R] float32, nats, unweighted, at temperature 1; [0] without labels
    top1_agreement_R: Tensor  # [R] float32, 1 where student and teacher prefer the same token; [0] without a teacher


def fused_linear_divergence(
    student_hidden_RD: Tensor,
    student_head: OutputHead,
    teacher_hidden_RE: Tensor,
    teacher_head: OutputHead,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    labels_R: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight_R: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """Sum over rows of weight * (kd_weight * D(student, teacher) + ce_weight * CE(student, label))."""
    z_RV, t_RV = student_head.logits(student_hidden_RD), teacher_head.logits(teacher_hidden_RE).detach()
    log_q_RV, log_p_RV = (z_RV / temperature).log_softmax(-1), (t_RV / temperature).log_softmax(-1)
    value_R, h_RV = divergence(log_q_RV.detach(), log_p_RV)
    surrogate_R = (h_RV * log_q_RV).sum(-1)
    divergence_R = value_R + surrogate_R - surrogate_R.detach()
    total_R = kd_weight * divergence_R
    cross_entropy_R = z_RV.new_empty(0)
    if labels_R is not None:
        cross_entropy_R = torch.nn.functional.cross_entropy(z_RV, labels_R, reduction="none")
        total_R = total_R + ce_weight * cross_entropy_R
    weight_R = torch.ones_like(total_R) if token_weight_R is None else token_weight_R
    return FusedLoss(
        loss_sum=(weight_R * total_R).sum(),
        divergence_R=divergence_R.detach(),
        cross_entropy_R=cross_entropy_R.detach(),
        top1_agreement_R=(z_RV.argmax(-1) == t_RV.argmax(-1)).float(),
    )


def fused_linear_cross_entropy(
    student_hidden_RD: Tensor,
    student_head: OutputHead,
    labels_R: Tensor,
    *,
    token_weight_R: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """Sum over rows of weight * CE(student, label)."""
    z_RV = student_head.logits(student_hidden_RD)
    cross_entropy_R = torch.nn.functional.cross_entropy(z_RV, labels_R, reduction="none")
    weight_R = torch.ones_like(cross_entropy_R) if token_weight_R is None else token_weight_R
    return FusedLoss(
        loss_sum=(weight_R * cross_entropy_R).sum(),
        divergence_R=z_RV.new_empty(0),
        cross_entropy_R=cross_entropy_R.detach(),
        top1_agreement_R=z_RV.new_empty(0),
    )
