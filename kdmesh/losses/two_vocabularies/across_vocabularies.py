"""Fused losses between distributions over two vocabularies, of which some tokens may be the same."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest
from kdmesh.losses.fused_linear import FusedCall, run_fused
from kdmesh.losses.rows import RowMaths, StudentSide
from kdmesh.losses.two_vocabularies.labelled import ChunkLoss, ChunkRows, LabelledRows
from kdmesh.losses.two_vocabularies.sorted_rows import HybridRows, HybridWeights, Matched
from kdmesh.losses.workspace import Workspace, default_workspace


def fused_linear_by_rank(
    student: LabelledRows,
    teacher: LabelledRows,
    chunks: ChunkRows,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
) -> ChunkLoss:
    """The sum over chunks of how far the probabilities of their first token differ, both in descending order.

    The Wasserstein distance between the two where any token is as far from any other, so no token needs to be known by
    the other side. Both are sorted, a few rows at a time: no [R, V] matrix is built, but a GPU holds about a dozen
    matrices of a tile (2^25 elements) for each vocabulary.

    Raises:
        InvalidRequest: a number is out of range, or shapes disagree.

    Source: Boizard et al. 2024 (ULD), arXiv:2402.12030, the closed form of its Wasserstein distance.
    Where the paper compares the t-th tokens of both, here those are compared that begin at the same byte.
    """
    matched = Matched.nothing(student.hidden_RD.device)
    weights = HybridWeights(beta=0.5, matched=0.0, unmatched=1.0)
    student, teacher = _tempered(student, teacher, temperature)
    factors = (_zeros(chunks), _zeros(chunks))
    loss, _ = _compare(student, teacher, chunks, matched, weights, factors, chunk_tokens, workspace)
    return loss


def fused_linear_hybrid(
    student: LabelledRows,
    teacher: LabelledRows,
    chunks: ChunkRows,
    *,
    matched: Matched,
    weights: HybridWeights,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
) -> ChunkLoss:
    """The sum over chunks of how far both differ in what may stand in place of them.

    Each side's distribution of the chunk's first token, times the probabilities of the other tokens in it: that of the
    whole chunk is exact, those of others have the factor alike. Tokens that both have are compared by the generalised
    Jensen-Shannon divergence, which is never negative, though what is compared does not add up to 1; the others as in
    fused_linear_by_rank. The factor carries a gradient too, for which the rows behind the first are gone through twice.

    Raises:
        InvalidRequest: a number is out of range, or shapes disagree.

    Source: Patino et al. 2025 (GOLD), https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation,
    as in TRL's GOLDTrainer; beta weighs the teacher.
    """
    if not 0 < weights.beta < 1:
        raise InvalidRequest(f"beta is {weights.beta}; it must lie between 0 and 1")
    student, teacher = _tempered(student, teacher, temperature)
    own_N, own_chunk_N = chunks.student_rows(skip=1)
    their_M, their_chunk_M = chunks.teacher_rows(skip=1)
    behind = student.picked(own_N)
    factors = (
        chunks.sums(behind.log_likelihoods(), own_chunk_N),
        chunks.sums(teacher.picked(their_M).log_likelihoods(), their_chunk_M),
    )
    loss, slope_C = _compare(student, teacher, chunks, matched, weights, factors, chunk_tokens, workspace)
    if not torch.is_grad_enabled():
        return loss
    gradient = behind.gradient_of(slope_C[own_chunk_N])
    return ChunkLoss(loss_sum=loss.loss_sum + gradient, divergence_C=loss.divergence_C)


def _compare(
    student: LabelledRows,
    teacher: LabelledRows,
    chunks: ChunkRows,
    matched: Matched,
    weights: HybridWeights,
    factors: tuple[Tensor, Tensor],
    chunk_tokens: int | None,
    workspace: Workspace | None,
) -> tuple[ChunkLoss, Tensor]:
    """Over the first rows of chunks; and the derivative of each by the logarithm of the student's factor."""
    hidden_CD = student.hidden_RD.index_select(0, chunks.student_begins_C)
    teacher_hidden_CE = teacher.hidden_RD.index_select(0, chunks.teacher_begins_C)
    slope_C = _zeros(chunks)

    def build_maths(side: StudentSide, tile_CV: Tensor) -> RowMaths:
        return HybridRows(side, teacher.head, matched, weights, factors, slope_C)

    loss = run_fused(
        FusedCall(
            student_head=student.head,
            teachers=[(teacher_hidden_CE.detach(), teacher.head.detached())],
            build_maths=build_maths,
            token_weight_R=None,
            chunk_tokens=chunk_tokens,
            workspace=workspace or default_workspace(hidden_CD.device),
        ),
        hidden_CD,
    )
    return ChunkLoss(loss_sum=loss.loss_sum, divergence_C=loss.divergence_R), slope_C


def _tempered(student: LabelledRows, teacher: LabelledRows, temperature: float) -> tuple[LabelledRows, LabelledRows]:
    if not temperature > 0:
        raise InvalidRequest(f"temperature is {temperature}; it must be positive")
    return student.at_temperature(temperature), teacher.at_temperature(temperature)


def _zeros(chunks: ChunkRows) -> Tensor:
    return torch.zeros(chunks.num_chunks, dtype=torch.float64, device=chunks.student_begins_C.device)
