"""Rows with their labels, and which of them stand for the same bytes under two tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdmesh.losses.fused_linear import fused_linear_cross_entropy
from kdmesh.losses.head import OutputHead


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledRows:
    """One model's rows and the tokens that they predict, in its own vocabulary."""

    hidden_RD: Tensor
    head: OutputHead
    labels_R: Tensor  # int64

    def picked(self, rows_N: Tensor) -> LabelledRows:
        """Those rows alone."""
        return replace(
            self, hidden_RD=self.hidden_RD.index_select(0, rows_N), labels_R=self.labels_R.index_select(0, rows_N)
        )

    def at_temperature(self, temperature: float) -> LabelledRows:
        """The same rows with flatter or sharper distributions."""
        return self if temperature == 1 else replace(self, head=self.head.at_temperature(temperature))

    @torch.no_grad()
    def log_likelihoods(self) -> Tensor:
        """[R] float64 nats of each label; carries no gradient."""
        return -fused_linear_cross_entropy(self.hidden_RD, self.head, self.labels_R).cross_entropy_R.double()

    def gradient_of(self, slope_R: Tensor) -> Tensor:
        """[] 0, whose gradient is that of the sum of slope * log-likelihood of each label.

        With the derivative of a loss by every log-likelihood as the slope, this is the gradient of that loss.
        """
        loss = fused_linear_cross_entropy(
            self.hidden_RD, self.head, self.labels_R, token_weight_R=-slope_R.to(self.hidden_RD.device)
        ).loss_sum
        return loss - loss.detach()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkRows:
    """Runs of rows of student and teacher whose labels are the same bytes; int64, on the device of the rows.

    Chunk c is rows student_begins_C[c] to student_ends_C[c], and likewise the teacher's; none is empty, none overlap.
    """

    student_begins_C: Tensor
    student_ends_C: Tensor
    teacher_begins_C: Tensor
    teacher_ends_C: Tensor
    num_student_rows: int | None = None  # in all chunks; None: a GPU is waited for to find it
    num_teacher_rows: int | None = None

    @property
    def num_chunks(self) -> int:
        """C."""
        return len(self.student_begins_C)

    def student_rows(self, *, skip: int = 0) -> tuple[Tensor, Tensor]:
        """(rows_N, chunk_N): every row of the student's in a chunk but the first `skip` of each, and its chunk."""
        return _members(self.student_begins_C, self.student_ends_C, skip, self.num_student_rows)

    def teacher_rows(self, *, skip: int = 0) -> tuple[Tensor, Tensor]:
        """As student_rows."""
        return _members(self.teacher_begins_C, self.teacher_ends_C, skip, self.num_teacher_rows)

    def sums(self, values_N: Tensor, chunk_N: Tensor) -> Tensor:
        """[C] of the values of each chunk; 0 where it has none."""
        return values_N.new_zeros(self.num_chunks).index_add_(0, chunk_N, values_N)


def _members(begins_C: Tensor, ends_C: Tensor, skip: int, num_rows: int | None) -> tuple[Tensor, Tensor]:
    begins_C = begins_C + skip
    lengths_C = ends_C - begins_C
    num_members = None if num_rows is None else num_rows - skip * len(begins_C)
    each_C = torch.arange(len(begins_C), device=begins_C.device)
    chunk_N = torch.repeat_interleave(each_C, lengths_C, output_size=num_members)
    before_C = lengths_C.cumsum(0) - lengths_C
    rows_N = torch.arange(len(chunk_N), device=begins_C.device) + (begins_C - before_C)[chunk_N]
    return rows_N, chunk_N


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkLoss:
    """A summed loss, and what each chunk came to."""

    loss_sum: Tensor  # [] float32, differentiable
    divergence_C: Tensor  # [C] float32, nats; carries no gradient
