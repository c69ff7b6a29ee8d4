"""Rows of two vocabularies with chunks, and textbook formulas for what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from kdmesh.losses import OutputHead
from kdmesh.losses.two_vocabularies.labelled import ChunkLoss, ChunkRows, LabelledRows
from tests.support.textbook_losses import Transform

Lengths = Sequence[tuple[int, int]]  # of each chunk: the student's rows, the teacher's; 0 rows of one: no chunk

_OWN, _THEIR = Transform(scale=0.8, softcap=4.0), Transform(scale=1.3, softcap=9.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCase:
    """The tensors follow from `seed`."""

    seed: int = 0
    lengths: Lengths = ((1, 1), (2, 1), (1, 0), (1, 3), (2, 2), (0, 2), (1, 1))
    own_vocabulary: int = 23
    their_vocabulary: int = 31
    student: Transform = _OWN
    teacher: Transform = _THEIR
    has_bias: bool = True
    temperature: float = 1.0


@st.composite
def cases(draw: st.DrawFn) -> ChunkCase:
    """Of any shape."""
    length = st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2), (3, 2), (1, 0), (0, 1)])
    return ChunkCase(
        seed=draw(st.integers(0, 2**31)),
        lengths=draw(st.lists(length, min_size=0, max_size=9)),
        own_vocabulary=draw(st.integers(2, 40)),
        their_vocabulary=draw(st.integers(2, 40)),
        student=draw(st.sampled_from([Transform(), Transform(scale=0.7), Transform(softcap=3.0)])),
        teacher=draw(st.sampled_from([Transform(), Transform(scale=1.5, softcap=5.0)])),
        has_bias=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.6, 1.0, 2.5])),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkInputs:
    """Both sides; the student's tensors require a gradient."""

    student: LabelledRows
    teacher: LabelledRows
    chunks: ChunkRows

    @property
    def leaves(self) -> list[Tensor]:
        """What carries a gradient."""
        head = self.student.head
        return [self.student.hidden_RD, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]


def inputs(case: ChunkCase, dtype: torch.dtype = torch.float64) -> ChunkInputs:
    """The tensors of `case`."""
    generator = torch.Generator().manual_seed(case.seed)
    own = sum(length for length, _ in case.lengths)
    their = sum(length for _, length in case.lengths)
    make = partial(_side, generator=generator, dtype=dtype, has_bias=case.has_bias)
    student = make(own, 5, case.own_vocabulary, case.student)
    for tensor in (student.hidden_RD, student.head.weight_VD, student.head.bias_V):
        if tensor is not None:
            tensor.requires_grad_()
    return ChunkInputs(
        student=student,
        teacher=make(their, 7, case.their_vocabulary, case.teacher),
        chunks=chunk_rows(case.lengths),
    )


def chunk_rows(lengths: Lengths) -> ChunkRows:
    """The chunks of those lengths one after the other."""
    ends = np.cumsum(np.array(lengths, dtype=np.int64).reshape(-1, 2), axis=0)
    begins = ends - np.array(lengths, dtype=np.int64).reshape(-1, 2)
    is_chunk = (ends - begins > 0).all(axis=1)
    columns = torch.from_numpy(np.concatenate([begins, ends], axis=1)[is_chunk])
    return ChunkRows(
        student_begins_C=columns[:, 0],
        teacher_begins_C=columns[:, 1],
        student_ends_C=columns[:, 2],
        teacher_ends_C=columns[:, 3],
    )


def outcome(loss: ChunkLoss, made: ChunkInputs, *, upstream: float = -1.5) -> list[Tensor]:
    """Value by chunk and in sum, and the gradients."""
    gradients = torch.autograd.grad(loss.loss_sum, made.leaves, torch.tensor(upstream, dtype=loss.loss_sum.dtype))
    return [loss.divergence_C, loss.loss_sum.detach(), *gradients]


def expected(
    made: ChunkInputs, of_chunk: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], temperature: float
) -> list[Tensor]:
    """As outcome, where a chunk is of_chunk(log q of its rows, its labels, and likewise the teacher's)."""
    student, teacher, chunks = made.student, made.teacher, made.chunks
    log_q_RV = (student.head.logits(student.hidden_RD) / temperature).log_softmax(-1)
    log_p_AW = (teacher.head.logits(teacher.hidden_RD) / temperature).log_softmax(-1)
    values = [
        of_chunk(log_q_RV[begin:end], student.labels_R[begin:end], log_p_AW[first:last], teacher.labels_R[first:last])
        for begin, end, first, last in zip(
            chunks.student_begins_C.tolist(),
            chunks.student_ends_C.tolist(),
            chunks.teacher_begins_C.tolist(),
            chunks.teacher_ends_C.tolist(),
            strict=True,
        )
    ]
    value_C = torch.stack(values) if values else log_q_RV.sum(-1)[:0]
    loss = ChunkLoss(loss_sum=value_C.sum() + 0 * log_q_RV.sum(), divergence_C=value_C.detach())
    return outcome(loss, made)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextbookEnds:
    """Where chunks may end."""

    followed: Sequence[bool]
    student_tokens: Sequence[int]
    teacher_tokens: Sequence[int]
    least: float


def expected_debiased(
    made: ChunkInputs, ends: TextbookEnds, of_likelihoods: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """As outcome, of of_likelihoods(log q, log p) of chunks that are joined, with what may follow them."""
    log_q_RV, log_p_AW = (side.head.logits(side.hidden_RD).log_softmax(-1) for side in (made.student, made.teacher))
    edges = (made.chunks.student_begins_C, made.chunks.student_ends_C)
    their_edges = (made.chunks.teacher_begins_C, made.chunks.teacher_ends_C)
    values = []
    log_q = log_p = log_q_RV.new_zeros(())
    for chunk, followed in enumerate(ends.followed):
        (begin, end), (first, last) = ([int(edge[chunk]) for edge in each] for each in (edges, their_edges))
        log_q = log_q + likelihood(log_q_RV[begin:end], made.student.labels_R[begin:end])
        log_p = log_p + likelihood(log_p_AW[first:last], made.teacher.labels_R[first:last])
        if followed:
            goes_on = log_p_AW[last].exp()[list(ends.teacher_tokens)].sum()
            if goes_on <= ends.least:
                continue
            log_p = log_p + goes_on.log()
            log_q = log_q + log_q_RV[end].exp()[list(ends.student_tokens)].sum().log()
        values.append(of_likelihoods(log_q, log_p))
        log_q = log_p = log_q_RV.new_zeros(())
    value_G = torch.stack(values) if values else log_q_RV.sum(-1)[:0]
    return outcome(ChunkLoss(loss_sum=value_G.sum() + 0 * log_q_RV.sum(), divergence_C=value_G.detach()), made)


def likelihood(log_q_NV: Tensor, labels_N: Tensor) -> Tensor:
    """[] of all labels together, in nats."""
    return log_q_NV.gather(-1, labels_N[:, None]).sum()


def _side(
    rows: int,
    size: int,
    vocabulary: int,
    transform: Transform,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    has_bias: bool,
) -> LabelledRows:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = OutputHead(
        weight_VD=normal(vocabulary, size),
        bias_V=normal(vocabulary) if has_bias else None,
        logit_scale=transform.scale,
        logit_softcap=transform.softcap,
    )
    labels_R = torch.randint(vocabulary, (rows,), generator=generator)
    return LabelledRows(hidden_RD=normal(rows, size), head=head, labels_R=labels_R)
