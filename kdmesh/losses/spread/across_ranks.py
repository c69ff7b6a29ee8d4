"""The fused loss where each rank has a part of the vocabulary, and all work on the rows of all in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdmesh.errors import InvalidRequest
from kdmesh.losses.divergences import forward_kl
from kdmesh.losses.fused_linear import FusedLoss
from kdmesh.losses.head import OutputHead
from kdmesh.losses.matmul import scaled
from kdmesh.losses.rows import Mix
from kdmesh.losses.spread.slice_form import slice_form
from kdmesh.losses.spread.slice_sweep import OwnRows, SliceCall, SliceSweep
from kdmesh.losses.spread.vocabulary_share import VocabularyShare
from kdmesh.losses.workspace import Workspace, default_workspace

# Without a teacher; the divergence is never asked.
CROSS_ENTROPY = Mix(divergence=forward_kl, temperature=1.0, kd_weight=0.0, ce_weight=1.0)


def fused_linear_across_ranks(
    rows: OwnRows,
    student_head: OutputHead,
    teacher_head: OutputHead | None,
    mix: Mix,
    share: VocabularyShare,
    *,
    counts: Sequence[int],
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
) -> FusedLoss:
    """As `fused_linear_divergence` for this rank's rows, with heads of which every rank has its own tokens' rows.

    Collective, also for a rank without rows. All ranks pass the same mix, labels or none, and chunk_tokens. Each works
    through the rows of all, chunk by chunk, over its own tokens, and what has to be summed over tokens is summed over
    ranks. The gradient is computed here, not in the backward pass, which is not collective.

    The gradient of the weight and of the bias is that of the *mean over ranks* of their loss_sum, which is what FSDP
    makes of a parameter that every rank has whole; nothing may reduce it again. Every rank must multiply its loss_sum
    by the same number.

    Args:
        student_head: this rank's real tokens; in the element type that is trained, and cast to that of the rows.
        teacher_head: the same tokens; None: cross-entropy alone, and mix is CROSS_ENTROPY.
        counts: rows of every rank.
        chunk_tokens: rows, of all ranks together, whose logit gradient exists at once; None chooses by device and
            vocabulary.
        workspace: as in fused_linear_divergence.

    Raises:
        InvalidRequest: shapes disagree, or the divergence is none that slices of a vocabulary are enough for.
    """
    form = None if teacher_head is None else slice_form(mix.divergence)
    if teacher_head is not None and form is None:
        raise InvalidRequest("the divergence looks at the whole vocabulary, of which each rank has a part")
    _check(rows, student_head, teacher_head, share, counts)
    call = SliceCall(
        rows=replace(rows, student_hidden_RD=rows.student_hidden_RD.detach()),
        student_head=student_head,
        teacher_head=None if teacher_head is None else teacher_head.detached(),
        mix=replace(mix, top_k=min(mix.top_k, share.vocabulary_size)),
        form=form,
        share=share,
        counts=counts,
        chunk_tokens=chunk_tokens,
        workspace=workspace or default_workspace(rows.student_hidden_RD.device),
    )
    inputs = rows.student_hidden_RD, student_head.weight_VD, student_head.bias_V
    wanted = tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs)
    loss_sum, *per_row = _AcrossRanks.apply(*inputs, call, wanted)  # type: ignore[no-untyped-call]
    return FusedLoss.of(loss_sum, per_row)


class _AcrossRanks(torch.autograd.Function):
    """Computes every gradient that is wanted in forward; backward multiplies it by a number."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: SliceCall, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        """The loss sum of this rank's rows, and their per-row tensors."""
        head = replace(call.student_head, weight_VD=weight_VD.to(hidden_RD.dtype), bias_V=bias_V)
        with torch.autocast(hidden_RD.device.type, enabled=False):
            values, gradients = SliceSweep(call, head, wanted).run()
            weight_R = call.rows.token_weight_R
            loss_sum = (values.loss_R if weight_R is None else values.loss_R * weight_R).sum()
        bias_gradient_V = None if gradients.bias_NV is None else gradients.bias_NV.sum(0)
        ctx.save_for_backward(gradients.hidden_RD, gradients.weight_VD, bias_gradient_V)
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype, weight_VD.dtype if bias_V is None else bias_V.dtype
        ctx.num_ranks = call.share.num_ranks
        per_row = values.told()
        ctx.mark_non_differentiable(*per_row)
        return loss_sum, *per_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times `loss_gradient`, in the dtypes of what they are gradients of."""
        # Rows are this rank's own; what the head got is from all ranks, of whose losses the mean is meant.
        of_mean = loss_gradient / ctx.num_ranks
        factors = loss_gradient, of_mean, of_mean
        gradients = (
            None if gradient is None else scaled(gradient, factor, dtype)
            for gradient, factor, dtype in zip(ctx.saved_tensors, factors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


def _check(
    rows: OwnRows, student: OutputHead, teacher: OutputHead | None, share: VocabularyShare, counts: Sequence[int]
) -> None:
    num_rows = len(rows.student_hidden_RD)
    if len(counts) != share.num_ranks or counts[share.rank] != num_rows:
        raise InvalidRequest(f"rank {share.rank} of {share.num_ranks} has {num_rows} rows, and the counts are {counts}")
    for name, head, hidden_RD in (
        ("student", student, rows.student_hidden_RD),
        ("teacher", teacher, rows.teacher_hidden_RE),
    ):
        if head is None or hidden_RD is None:
            continue
        if head.vocabulary_size != share.num_tokens:
            raise InvalidRequest(
                f"the {name}'s head has {head.vocabulary_size} tokens; rank {share.rank} has {share.num_tokens}"
            )
        if hidden_RD.shape != (num_rows, head.hidden_size):
            raise InvalidRequest(
                f"the {name}'s hidden states have shape {tuple(hidden_RD.shape)}; needed is "
                f"({num_rows}, {head.hidden_size})"
            )
