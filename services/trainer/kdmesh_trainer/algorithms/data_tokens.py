"""Cross-entropy of the data's own tokens, beside what an algorithm compares."""

from __future__ import annotations

from dataclasses import replace

import torch

from kdmesh.losses import FusedLoss, fused_linear_cross_entropy
from kdmesh_trainer.algorithms.seam import LossRows, Terms


def cross_entropy(rows: LossRows, terms: Terms) -> FusedLoss:
    """That of every row; its sum, without ce_weight, is of those that the student did not draw, which are imitated."""
    is_data_R = torch.ones(len(rows.labels_R), device=rows.labels_R.device)
    is_data_R[: rows.num_sampled] = 0
    learns = terms.ce_weight > 0 and rows.num_sampled < len(rows.labels_R)
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        return fused_linear_cross_entropy(rows.hidden_RD, rows.head, rows.labels_R, token_weight_R=is_data_R)


def with_cross_entropy(loss: FusedLoss, rows: LossRows, terms: Terms) -> FusedLoss:
    """`loss`, with ce_weight times that sum."""
    whole = cross_entropy(rows, terms)
    return replace(
        loss,
        loss_sum=loss.loss_sum + terms.ce_weight * whole.loss_sum,
        cross_entropy_R=whole.cross_entropy_R,
    )
