"""Compares how likely teacher and student find the same bytes, whatever tokens they have for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest
from kdmesh.losses.two_vocabularies.labelled import ChunkLoss, ChunkRows, LabelledRows

# Keeps the logarithm of 1 - p finite for what is certain. A large tau leaves little of the likelihoods' logarithms, of
# which it must stay a small part.
_MARGIN = 1e-6
_MARGIN_NATS = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boundaries:
    """Where chunks may end, so that a chunk's likelihood is that of its bytes and not of how they were cut.

    A token that ends within a word says that no longer token fits there, which another tokenizer's tokens for the same
    bytes do not say. So a chunk is compared together with the probability that a word ends behind it.
    """

    student_B: Tensor  # [B] int64 the student's tokens that begin with what no token has inside, or end a turn
    teacher_B: Tensor  # [B'] the teacher's
    least: float  # a chunk ends only where the teacher gives its own more than this; else it goes on with the next one


def fused_linear_chunk_likelihood(
    student: LabelledRows,
    teacher: LabelledRows,
    chunks: ChunkRows,
    *,
    tau: float,
    student_log_likelihood_R: Tensor | None = None,
    boundaries: Boundaries | None = None,
    followed_F: Tensor | None = None,
) -> ChunkLoss:
    """The sum over chunks of `binary_kl` of their likelihoods; a chunk's is the product of its tokens'.

    Memory is that of cross-entropy: the heads are gone through once for the likelihoods and the student's once more for
    the gradient, and no [R, V] matrix is built. With `boundaries` as often again, and once through part of each head.

    Args:
        student: carries the gradient.
        teacher: never carries one.
        student_log_likelihood_R: where it is known already, at temperature 1.
        boundaries: the likelihood of a chunk that is followed is multiplied by that of a boundary behind it, and chunks
            that end at none are joined. What nothing follows is compared as it is.
        followed_F: int64, ascending, on the device of the rows: the chunks whose next one begins with the row behind
            them, on both sides. `boundaries` need it, and for what the teacher says of these a GPU is waited for once.

    Raises:
        InvalidRequest: tau is not positive, or shapes disagree.

    Source: Minixhofer et al. 2025 (ALM), arXiv:2503.20083; `boundaries` are its section 3.1, outcome chunk debiasing,
    after Pimentel and Meister 2024, arXiv:2406.14561.
    """
    if not tau > 0:
        raise InvalidRequest(f"tau is {tau}; it must be positive")
    rows_N, chunk_N = chunks.student_rows()  # G below: joined chunks, which are the chunks where none are
    own = student.picked(rows_N)
    known_N = None if student_log_likelihood_R is None else student_log_likelihood_R.detach()[rows_N].double()
    log_q_G = chunks.sums(own.log_likelihoods() if known_N is None else known_N, chunk_N)
    rows_M, chunk_M = chunks.teacher_rows()
    log_p_G = chunks.sums(teacher.picked(rows_M).log_likelihoods(), chunk_M)
    ends = None
    if boundaries is not None:
        if followed_F is None:
            raise InvalidRequest("boundaries need followed_F, the chunks that another one follows")
        ends = _Ends.found(student, teacher, chunks, boundaries=boundaries, followed_F=followed_F)
        chunk_N = ends.group_C[chunk_N]
        log_q_G = ends.joined(log_q_G, ends.student.log_probabilities())
        log_p_G = ends.joined(log_p_G, ends.log_boundary_F)
    value_G, slope_G = binary_kl(log_q_G, log_p_G, tau=tau)
    loss_sum = value_G.sum().to(own.hidden_RD.dtype if own.hidden_RD.dtype is torch.float64 else torch.float32)
    if torch.is_grad_enabled():
        loss_sum = loss_sum + own.gradient_of(slope_G[chunk_N])
        if ends is not None:
            loss_sum = loss_sum + ends.student.gradient_of(slope_G[ends.group_F])
    return ChunkLoss(loss_sum=loss_sum, divergence_C=value_G.to(loss_sum.dtype))


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
    margin = min(_MARGIN, _MARGIN_NATS / tau)
    log_b_C, log_a_C = log_q_C / tau - margin, log_p_C / tau - margin
    a_C, not_a_C, not_b_C = log_a_C.exp(), -log_a_C.expm1(), -log_b_C.expm1()
    value_C = a_C * (log_a_C - log_b_C) + not_a_C * (not_a_C.log() - not_b_C.log())
    return value_C * tau, (not_a_C - not_b_C) / not_b_C


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _AnyOf:
    """Rows, and how likely each finds that one of some tokens comes next.

    log(sum over some) - log(sum over all) of exp(logit) is the log-likelihood of any one of these tokens among all,
    less that among them. So both come from the loss that never holds a row of logits of the whole vocabulary.
    """

    among_all: LabelledRows
    among_some: LabelledRows

    @classmethod
    def of(cls, side: LabelledRows, rows_F: Tensor, tokens_B: Tensor) -> _AnyOf:
        """Those rows of `side`."""
        hidden_FD = side.hidden_RD.index_select(0, rows_F)
        first_F = torch.zeros_like(rows_F)
        return cls(
            among_all=LabelledRows(hidden_RD=hidden_FD, head=side.head, labels_R=tokens_B[first_F]),
            among_some=LabelledRows(hidden_RD=hidden_FD, head=side.head.selected(tokens_B), labels_R=first_F),
        )

    def log_probabilities(self) -> Tensor:
        """[F] float64 nats; carries no gradient."""
        return (self.among_all.log_likelihoods() - self.among_some.log_likelihoods()).clamp_max(0)

    def gradient_of(self, slope_F: Tensor) -> Tensor:
        """See LabelledRows."""
        return self.among_all.gradient_of(slope_F) - self.among_some.gradient_of(slope_F)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ends:
    """Which chunks are joined, and what follows where a joined one ends and something follows."""

    num_groups: int
    group_C: Tensor  # int64, not falling: the joined chunk that each is in
    group_F: Tensor  # int64: the joined chunks that something follows
    log_boundary_F: Tensor  # float64 nats: that the teacher goes on with a boundary there
    student: _AnyOf

    @classmethod
    def found(
        cls,
        student: LabelledRows,
        teacher: LabelledRows,
        chunks: ChunkRows,
        *,
        boundaries: Boundaries,
        followed_F: Tensor,
    ) -> _Ends:
        """Of the chunks, as the teacher has it."""
        asked = _AnyOf.of(teacher, chunks.teacher_ends_C[followed_F], boundaries.teacher_B)
        log_boundary_F = asked.log_probabilities()
        is_end_F = log_boundary_F.exp() > boundaries.least
        is_end_C = torch.ones(chunks.num_chunks, dtype=torch.bool, device=followed_F.device)
        is_end_C[followed_F] = is_end_F
        ended_C = is_end_C.long().cumsum(0)
        group_C = ended_C - is_end_C.long()
        num_ends, num_groups = 0, 0
        if chunks.num_chunks > 0:
            num_ends, num_groups = torch.stack([is_end_F.sum(), group_C[-1] + 1]).tolist()  # the one wait for a GPU
        ends_F = torch.nonzero_static(is_end_F, size=num_ends)[:, 0]
        kept_F = followed_F[ends_F]
        return cls(
            num_groups=num_groups,
            group_C=group_C,
            group_F=ended_C[kept_F] - 1,
            log_boundary_F=log_boundary_F[ends_F],
            student=_AnyOf.of(student, chunks.student_ends_C[kept_F], boundaries.student_B),
        )

    def joined(self, values_C: Tensor, boundary_F: Tensor) -> Tensor:
        """[G] the sum over each joined chunk, and of what follows it."""
        summed_G = values_C.new_zeros(self.num_groups).index_add_(0, self.group_C, values_C)
        return summed_G.index_add_(0, self.group_F, boundary_F)
