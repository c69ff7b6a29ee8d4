"""Compares the student's distribution with the teacher's, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from kdmesh.losses import FusedLoss
from kdmesh.models.packing import moved
from kdmesh_trainer.algorithms.data_tokens import with_cross_entropy
from kdmesh_trainer.algorithms.seam import LossRows, Terms
from kdmesh_trainer.objectives.head import Target


def vanilla_kd(rows: LossRows, terms: Terms) -> FusedLoss:
    """kd_weight * divergence(student, teacher) + ce_weight * cross-entropy, where a row's teacher may be a mixture."""
    targets = rows.targets()
    if (tokens_S := targets[0].tokens_S) is not None:
        (target,) = targets
        return _over_shared_tokens(target, tokens_S, rows, terms)
    if targets[0].index_R is None:
        (target,) = targets
        return _against(target, rows, terms)
    # The rows of one teacher after those of another, and then each in its place again.
    device = rows.hidden_RD.device
    indices = [_index(target) for target in targets]
    parts = [
        _against(
            target,
            replace(
                rows,
                hidden_RD=rows.hidden_RD.index_select(0, there_R),
                labels_R=rows.labels_R[there_R],
                weight_R=None if rows.weight_R is None else rows.weight_R[there_R],
                num_sampled=int((index_R < rows.num_sampled).sum()),
            ),
            terms,
        )
        for target, index_R, there_R in zip(targets, indices, [moved(each, device) for each in indices], strict=True)
    ]
    return _joined(parts, order_R=moved(torch.cat(indices).argsort(), device))


def _over_shared_tokens(target: Target, tokens_S: Tensor, rows: LossRows, terms: Terms) -> FusedLoss:
    """The divergence of the rows that have an answer, over the tokens that both know, and cross-entropy of all."""
    index_R = moved(_index(target), rows.hidden_RD.device)
    answered = terms.compare(
        rows.hidden_RD.index_select(0, index_R), rows.head.selected(tokens_S), target.teachers, None
    )
    return with_cross_entropy(answered, rows, terms)


def _against(target: Target, rows: LossRows, terms: Terms) -> FusedLoss:
    """The loss of the rows of one target, which are all of `rows`."""
    if rows.num_sampled == 0 or terms.ce_weight == 0:
        return terms.compare(
            rows.hidden_RD,
            rows.head,
            target.teachers,
            rows.labels_R,
            ce_weight=terms.ce_weight,
            token_weight_R=rows.weight_R,
        )
    weights = ((slice(0, rows.num_sampled), 0.0), (slice(rows.num_sampled, None), terms.ce_weight))
    parts = [
        terms.compare(
            rows.hidden_RD[some],
            rows.head,
            [replace(teacher, hidden_RE=teacher.hidden_RE[some]) for teacher in target.teachers],
            rows.labels_R[some],
            ce_weight=weight,
            token_weight_R=None if rows.weight_R is None else rows.weight_R[some],
        )
        for some, weight in weights
        if len(rows.labels_R[some]) > 0
    ]
    return _joined(parts)


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
