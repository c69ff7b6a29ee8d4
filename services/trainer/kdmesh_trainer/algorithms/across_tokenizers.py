"""Compares runs of tokens that are the same bytes for a student and a teacher with different tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdmesh.losses import (
    Boundaries,
    ChunkLoss,
    ChunkRows,
    FusedLoss,
    HybridWeights,
    LabelledRows,
    Matched,
    fused_linear_by_rank,
    fused_linear_chunk_likelihood,
    fused_linear_hybrid,
)
from kdmesh.models.packing import moved
from kdmesh.types import Int32Array, TokenSequence
from kdmesh_trainer.algorithms.data_tokens import cross_entropy
from kdmesh_trainer.algorithms.seam import LossRows, Terms
from kdmesh_trainer.data.encoding.sides import Chunks, InChunks

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runs:
    """Both sides of one micro-batch, with the runs that are the same bytes."""

    student: LabelledRows
    teacher: LabelledRows
    chunks: ChunkRows
    followed_F: Tensor  # int64, ascending: the runs that the next one begins right behind, for both
    student_log_likelihood_R: Tensor  # float32 nats, at temperature 1; carries no gradient


class Compare(Protocol):
    """What is summed over the runs."""

    def __call__(self, runs: Runs, *, temperature: float) -> ChunkLoss:
        """Its value and gradient, without a weight."""
        ...


class AcrossTokenizers:
    """kd_weight * what `compare` makes of the runs + ce_weight * cross-entropy of every row that was not sampled."""

    def __init__(self, compare: Compare) -> None:
        self._compare = compare

    def __call__(self, rows: LossRows, terms: Terms) -> FusedLoss:
        """See Algorithm; the divergences are those of the runs, so fewer than rows."""
        labelled = cross_entropy(rows, terms)
        (target,) = rows.whole_targets()
        (teacher,) = target.teachers
        device = rows.hidden_RD.device
        chunks, teacher_labels_A, followed_F = _joined(rows.sequences)
        loss = self._compare(
            Runs(
                student=LabelledRows(hidden_RD=rows.hidden_RD, head=rows.head, labels_R=rows.labels_R),
                teacher=LabelledRows(
                    hidden_RD=teacher.hidden_RE, head=teacher.head, labels_R=moved(teacher_labels_A, device)
                ),
                chunks=ChunkRows(
                    student_begins_C=_on(device, chunks.student_begins),
                    student_ends_C=_on(device, chunks.student_ends),
                    teacher_begins_C=_on(device, chunks.teacher_begins),
                    teacher_ends_C=_on(device, chunks.teacher_ends),
                    num_student_rows=int((chunks.student_ends - chunks.student_begins).sum()),
                    num_teacher_rows=int((chunks.teacher_ends - chunks.teacher_begins).sum()),
                ),
                followed_F=moved(followed_F, device),
                student_log_likelihood_R=-labelled.cross_entropy_R,
            ),
            temperature=terms.temperature,
        )
        absent_0 = labelled.divergence_R
        return FusedLoss(
            loss_sum=terms.kd_weight * loss.loss_sum + terms.ce_weight * labelled.loss_sum,
            divergence_R=loss.divergence_C,
            cross_entropy_R=labelled.cross_entropy_R,
            top1_agreement_R=absent_0,
            student_entropy_R=absent_0,
            teacher_entropy_R=absent_0,
            topk_overlap_R=absent_0,
        )


def chunk_likelihood(runs: Runs, *, temperature: float, tau: float, boundaries: Boundaries | None = None) -> ChunkLoss:
    """ALM's binarised divergence of likelihoods; temperature is 1."""
    return fused_linear_chunk_likelihood(
        runs.student,
        runs.teacher,
        runs.chunks,
        tau=tau,
        student_log_likelihood_R=runs.student_log_likelihood_R,
        boundaries=boundaries,
        followed_F=runs.followed_F,
    )


def by_rank(runs: Runs, *, temperature: float) -> ChunkLoss:
    """ULD's sorted probabilities of the first token."""
    return fused_linear_by_rank(runs.student, runs.teacher, runs.chunks, temperature=temperature)


def hybrid(
    runs: Runs,
    *,
    temperature: float,
    matched: Matched,
    beta: float,
    matched_weight: float | None,
    unmatched_weight: float | None,
) -> ChunkLoss:
    """GOLD's comparison of what both vocabularies have, and of the rest; weights that are None are their parts."""
    part = len(matched.teacher_M) / runs.teacher.head.vocabulary_size
    weights = HybridWeights(
        beta=beta,
        matched=part if matched_weight is None else matched_weight,
        unmatched=1 - part if unmatched_weight is None else unmatched_weight,
    )
    return fused_linear_hybrid(
        runs.student, runs.teacher, runs.chunks, matched=matched, weights=weights, temperature=temperature
    )


def _joined(sequences: Sequence[TokenSequence]) -> tuple[Chunks, Tensor, Tensor]:
    """Over the rows of all of them, the teacher's labels, and the runs that the next one follows."""
    parts, labels, followed = [], [], []
    own_rows = their_rows = 0
    for sequence in sequences:
        assert isinstance(sequence, InChunks)
        parts.append(sequence.chunks.shifted(own_rows, their_rows))
        labels.append(sequence.teacher.labels)
        followed.append(_followed(sequence))
        own_rows += sequence.num_rows
        their_rows += sequence.teacher.num_rows
    teacher_labels_A = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    return Chunks.joined(parts), teacher_labels_A, torch.from_numpy(np.flatnonzero(np.concatenate(followed)))


def _followed(sequence: InChunks) -> BoolArray:
    """[C] whether the next run's first token comes right behind this one's last, for both."""
    chunks = sequence.chunks
    is_followed_C = np.zeros(len(chunks.student_begins), dtype=np.bool_)
    is_followed_C[:-1] = _adjoins(sequence, chunks.student_begins, chunks.student_ends) & _adjoins(
        sequence.teacher, chunks.teacher_begins, chunks.teacher_ends
    )
    return is_followed_C


def _adjoins(rows: TokenSequence, begins: Int32Array, ends: Int32Array) -> BoolArray:
    """Whether each run but the first begins where the one before it ends; rows may leave out tokens between them."""
    found: BoolArray = (begins[1:] == ends[:-1]) & (rows.positions[begins[1:]] == rows.positions[ends[:-1] - 1] + 1)
    return found


def _on(device: torch.device, numbers: Int32Array) -> Tensor:
    return moved(torch.from_numpy(numbers.astype(np.int64)), device)
