"""Compares how likely teacher and student find the same bytes, whatever tokens they have for them."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest
from kdmesh.losses.labelled import ChunkLoss, ChunkRows, LabelledRows

# Keeps the logarithm of 1 - p finite for what is certain.
_MARGIN = 1e-6


def fused_linear_chunk_likelihood(
    student: LabelledRows,
    teacher: LabelledRows,
    chunks: ChunkRows,
    *,
    tau: float,
    student_log_likelihood_R: Tensor | None = None,
) -> ChunkLoss:
    """The sum over chunks of `binary_kl` of their likelihoods; a chunk's is the product of its tokens'.

    Memory is that of cross-entropy: the heads are gone through once for the likelihoods and the student's once more for
    the gradient, and no [R, V] matrix is built.

    Args:
        student: carries the gradient.
        teacher: never carries one.
        student_log_likelihood_R: where it is known already, at temperature 1.

    Raises:
        InvalidRequest: tau is not positive, or shapes disagree.
    """
    if not tau > 0:
        raise InvalidRequest(f"tau is {tau}; it must be positive")
    rows_N, chunk_N = chunks.student_rows()
    own = student.picked(rows_N)
    known_N = None if student_log_likelihood_R is None else student_log_likelihood_R.detach()[rows_N].double()
    log_q_C = chunks.sums(own.log_likelihoods() if known_N is None else known_N, chunk_N)
    rows_M, chunk_M = chunks.teacher_rows()
    log_p_C = chunks.sums(teacher.picked(rows_M).log_likelihoods(), chunk_M)
    value_C, slope_C = binary_kl(log_q_C, log_p_C, tau=tau)
    loss_sum = value_C.sum().to(own.hidden_RD.dtype if own.hidden_RD.dtype is torch.float64 else torch.float32)
    if torch.is_grad_enabled():
        loss_sum = loss_sum + own.gradient_of(slope_C[chunk_N])
    return ChunkLoss(loss_sum=loss_sum, divergence_C=value_C.to(loss_sum.dtype))


def binary_kl(log_q_C: Tensor, log_p_C: Tensor, *, tau: float) -> tuple[Tensor, Tensor]:
    """tau * KL between (a, 1 - a) and (b, 1 - b), with a = p^(1/tau) and b = q^(1/tau); and its derivative by log q.

    The probability that the text goes on like this, against that it does in any other way. A long chunk is unlikely on
    both sides, and tau brings its likelihood to where the two differ visibly. For tau towards infinity it becomes
    |log p| log(log p / log q) - |log p| + |log q|.

    Args:
        log_q_C: the student's, nats, at most 0.
        log_p_C: the teacher's.

    Source: Minixhofer et al. 2025 (ALM), arXiv:2503.20083, the binarised f-divergence with f of KL. The factor tau,
    without which it fades as 1/tau, is ours.
    """
    log_b_C, log_a_C = log_q_C / tau - _MARGIN, log_p_C / tau - _MARGIN
    a_C, not_a_C, not_b_C = log_a_C.exp(), -log_a_C.expm1(), -log_b_C.expm1()
    value_C = a_C * (log_a_C - log_b_C) + not_a_C * (not_a_C.log() - not_b_C.log())
    return value_C * tau, (not_a_C - not_b_C) / not_b_C
