"""Losses between two vocabularies: a CPU's numbers, and no wait for the device where none is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdmesh.losses import (
    Boundaries,
    ChunkLoss,
    ChunkRows,
    HybridWeights,
    LabelledRows,
    Matched,
    OutputHead,
    fused_linear_by_rank,
    fused_linear_chunk_likelihood,
    fused_linear_hybrid,
)

pytestmark = pytest.mark.gpu

Compare = Callable[[LabelledRows, LabelledRows, ChunkRows], ChunkLoss]
BEGINS, ENDS = [0, 2, 3, 6], [2, 3, 6, 9]  # of 10 rows, on both sides


def side(vocabulary: int, device: torch.device) -> LabelledRows:
    generator = torch.Generator().manual_seed(vocabulary)
    return LabelledRows(
        hidden_RD=torch.randn(10, 16, generator=generator).to(device),
        head=OutputHead(weight_VD=torch.randn(vocabulary, 16, generator=generator).to(device)),
        labels_R=torch.randint(vocabulary, (10,), generator=generator).to(device),
    )


def chunk_rows(device: torch.device) -> ChunkRows:
    begins_C, ends_C = torch.tensor(BEGINS, device=device), torch.tensor(ENDS, device=device)
    return ChunkRows(
        student_begins_C=begins_C,
        student_ends_C=ends_C,
        teacher_begins_C=begins_C,
        teacher_ends_C=ends_C,
        num_student_rows=9,
        num_teacher_rows=9,
    )


def compares(device: torch.device) -> dict[str, Compare]:
    matched = Matched(student_M=torch.arange(5, 40, device=device), teacher_M=torch.arange(35, device=device))
    weights = HybridWeights(beta=0.5, matched=0.4, unmatched=0.6)
    boundaries = Boundaries(
        student_B=torch.arange(0, 300, 3, device=device), teacher_B=torch.arange(0, 200, 3, device=device), least=0.3
    )
    followed_F = torch.tensor([0, 1, 2], device=device)
    return {
        "alm": lambda *sides: fused_linear_chunk_likelihood(*sides, tau=20.0),
        "alm, debiased": lambda *sides: fused_linear_chunk_likelihood(
            *sides, tau=20.0, boundaries=boundaries, followed_F=followed_F
        ),
        "uld": lambda *sides: fused_linear_by_rank(*sides),
        "gold": lambda *sides: fused_linear_hybrid(*sides, matched=matched, weights=weights),
    }


def value_and_gradient(
    compare: Compare, student: LabelledRows, teacher: LabelledRows, chunks: ChunkRows
) -> list[Tensor]:
    student.hidden_RD.requires_grad_().grad = None
    loss = compare(student, teacher, chunks)
    loss.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert student.hidden_RD.grad is not None
    return [loss.loss_sum.detach(), loss.divergence_C, student.hidden_RD.grad]


@pytest.mark.parametrize("name", ["alm", "alm, debiased", "uld", "gold"])
def test_values_and_gradients_are_those_of_a_cpu(name: str, device: torch.device) -> None:
    cpu = torch.device("cpu")
    expected, found = (
        value_and_gradient(compares(where)[name], side(300, where), side(200, where), chunk_rows(where))
        for where in (cpu, device)
    )
    for there, here in zip(found, expected, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["alm", "uld", "gold"])
def test_nothing_waits_for_the_device(name: str, gpu: torch.device) -> None:
    compare, student, teacher, chunks = compares(gpu)[name], side(300, gpu), side(200, gpu), chunk_rows(gpu)
    value_and_gradient(compare, student, teacher, chunks)  # what a vocabulary has alone is found
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(compare, student, teacher, chunks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
