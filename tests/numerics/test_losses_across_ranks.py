"""The fused loss of ranks that have a part of the vocabulary each, against the textbook's over all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kdmesh.errors import InvalidRequest
from kdmesh.losses import (
    CROSS_ENTROPY,
    Mix,
    OutputHead,
    OwnRows,
    VocabularyShare,
    fused_linear_across_ranks,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.parallel_config import SPREAD_DIVERGENCES
from tests.support.loss_cases import FULL, Case, Tensors, call, expected, heads, tensors
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_losses_across_ranks"
TOP_K = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What one rank has of a case."""

    share: VocabularyShare
    counts: list[int]
    rows: slice
    student: OutputHead
    teacher: OutputHead
    hidden_RD: Tensor
    leaves: list[Tensor]  # as in Tensors, this rank's part of each


def part(case: Case, inputs: Tensors, mesh: Mesh, counts: list[int]) -> Part:
    share = VocabularyShare(
        vocabulary_size=case.vocabulary,
        padded_size=case.vocabulary + case.padding,
        rank=mesh.rank,
        num_ranks=mesh.world_size,
    )
    tokens = slice(share.first, share.first + share.num_padded)
    before = sum(counts[: mesh.rank])
    rows = slice(before, before + counts[mesh.rank])
    hidden_RD, *parameters = (leaf.detach() for leaf in inputs.leaves)
    leaves = [hidden_RD[rows].clone(), *(parameter[tokens].clone() for parameter in parameters)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    student, teacher = heads(replace(case, vocabulary=case.vocabulary + case.padding), inputs)
    return Part(
        share=share,
        counts=counts,
        rows=rows,
        student=replace(student, weight_VD=leaves[1], bias_V=leaves[2] if case.has_bias else None).part(
            0, share.num_tokens
        ),
        teacher=teacher.part(share.first, share.num_tokens),
        hidden_RD=leaves[0],
        leaves=leaves,
    )


def own_rows(inputs: Tensors, part: Part) -> OwnRows:
    return OwnRows(
        student_hidden_RD=part.hidden_RD,
        teacher_hidden_RE=inputs.teacher_hidden_RE[part.rows],
        labels_R=None if inputs.labels_R is None else inputs.labels_R[part.rows],
        token_weight_R=None if inputs.token_weight_R is None else inputs.token_weight_R[part.rows],
    )


def mix(case: Case) -> Mix:
    return Mix(
        divergence=case.divergence,
        temperature=case.temperature,
        kd_weight=case.kd_weight,
        ce_weight=case.ce_weight,
        with_entropies=True,
        top_k=TOP_K,
    )


def compare(case: Case, mesh: Mesh, counts: list[int]) -> None:
    """Values of own rows and gradients of what this rank has are the textbook's; figures those of the whole head."""
    inputs = tensors(case, torch.float64)
    own = part(case, inputs, mesh, counts)
    loss = fused_linear_across_ranks(
        own_rows(inputs, own),
        own.student,
        own.teacher,
        mix(case),
        own.share,
        counts=counts,
        chunk_tokens=case.chunk_tokens,
    )
    gradients = torch.autograd.grad(loss.loss_sum * case.upstream, own.leaves)
    reference = expected(case, inputs)
    close(loss.divergence_R, reference.divergence_R[own.rows])
    if case.has_labels:
        close(loss.cross_entropy_R, reference.cross_entropy_R[own.rows])
    loss_sum = loss.loss_sum.detach().clone()
    dist.all_reduce(loss_sum)
    close(loss_sum, reference.loss_sum)
    assert_gradients(gradients, reference.gradients, own, mesh.world_size)
    whole = call(case, inputs, with_entropies=True, top_k=TOP_K)
    close(loss.top1_agreement_R, whole.top1_agreement_R[own.rows])
    close(loss.topk_overlap_R, whole.topk_overlap_R[own.rows])
    close(loss.student_entropy_R, whole.student_entropy_R[own.rows])
    close(loss.teacher_entropy_R, whole.teacher_entropy_R[own.rows])


def assert_gradients(
    gradients: Sequence[Tensor], reference: Sequence[Tensor], own: Part, ranks: int, *, tolerance: float = 1e-11
) -> None:
    """Of own rows and, as the mean over ranks, of own tokens."""
    tokens = slice(own.share.first, own.share.first + own.share.num_padded)
    close(gradients[0], reference[0][own.rows], tolerance=tolerance)
    for mine, theirs in zip(gradients[1:], reference[1:], strict=True):
        close(mine, theirs[tokens] / ranks, tolerance=tolerance)


def close(actual: Tensor, reference: Tensor, *, tolerance: float = 1e-11) -> None:
    assert actual.shape == reference.shape
    if actual.numel():
        error = (actual.double() - reference.double()).abs().max().item()
        assert error <= tolerance * max(1.0, reference.abs().max().item()), error


def uneven(rows: int, ranks: int) -> list[list[int]]:
    """Ways to give rows to ranks: some more, some none, all to the last."""
    ways = {
        1: [[rows]],
        2: [[rows - 3, 3], [0, rows]],
        3: [[rows - 5, 0, 5], [4, rows - 5, 1], [0, 0, rows]],
    }
    return ways[ranks]


def all_cases(mesh: Mesh, *, every: int) -> int:
    """Compares every divergence, alone and with every option, over vocabularies that do not divide; how many."""
    number = 0
    for name in SPREAD_DIVERGENCES:
        for case in (
            Case(name=name, knob=0.7, rows=13, vocabulary=41, seed=1),
            replace(FULL, name=name, knob=0.3, seed=2),
            replace(FULL, name=name, knob=0.4, seed=3, vocabulary=300, padding=17, rows=19, chunk_tokens=None),
            Case(name=name, knob=0.2, rows=9, vocabulary=4, padding=11, temperature=0.6, seed=4, chunk_tokens=1),
        ):
            ways = uneven(case.rows, mesh.world_size)
            if number % every == 0:
                compare(case, mesh, ways[number % len(ways)])
            number += 1
    return number


def other_calls(mesh: Mesh) -> None:
    """Cross-entropy alone, a weight of it for each row, no gradient, no rows, smaller types."""
    case = replace(FULL, upstream=1.0, has_token_weights=False)
    inputs = tensors(case, torch.float64)
    counts = uneven(case.rows, mesh.world_size)[0]
    assert inputs.labels_R is not None
    whole_head, teacher_head = heads(case, inputs)

    own = part(case, inputs, mesh, counts)
    rows = replace(own_rows(inputs, own), teacher_hidden_RE=None)
    loss = fused_linear_across_ranks(rows, own.student, None, CROSS_ENTROPY, own.share, counts=counts, chunk_tokens=8)
    reference = fused_linear_cross_entropy(inputs.student_hidden_RD, whole_head, inputs.labels_R)
    close(loss.cross_entropy_R, reference.cross_entropy_R[own.rows])
    assert len(loss.divergence_R) == len(loss.top1_agreement_R) == len(loss.topk_overlap_R) == 0
    theirs = torch.autograd.grad(reference.loss_sum, inputs.leaves)
    assert_gradients(torch.autograd.grad(loss.loss_sum, own.leaves), theirs, own, mesh.world_size)

    own = part(case, inputs, mesh, counts)
    weight_R = torch.arange(case.rows) % 3 / 2
    rows = replace(own_rows(inputs, own), ce_weight_R=weight_R[own.rows])
    loss = fused_linear_across_ranks(rows, own.student, own.teacher, mix(case), own.share, counts=counts)
    both = [
        fused_linear_divergence(
            inputs.student_hidden_RD,
            whole_head,
            inputs.teacher_hidden_RE,
            teacher_head,
            divergence=case.divergence,
            temperature=case.temperature,
            kd_weight=case.kd_weight,
        ).loss_sum,
        fused_linear_cross_entropy(
            inputs.student_hidden_RD, whole_head, inputs.labels_R, token_weight_R=weight_R
        ).loss_sum,
    ]
    theirs = torch.autograd.grad(both[0] + both[1], inputs.leaves)
    assert_gradients(torch.autograd.grad(loss.loss_sum, own.leaves), theirs, own, mesh.world_size)

    own = part(case, inputs, mesh, counts)
    with torch.no_grad():
        without = fused_linear_across_ranks(
            own_rows(inputs, own), own.student, own.teacher, mix(case), own.share, counts=counts
        )
    assert not without.loss_sum.requires_grad
    close(without.divergence_R, expected(case, inputs).divergence_R[own.rows])

    nothing = part(case, inputs, mesh, [0] * mesh.world_size)
    loss = fused_linear_across_ranks(
        own_rows(inputs, nothing), nothing.student, nothing.teacher, mix(case), nothing.share, counts=nothing.counts
    )
    assert loss.loss_sum == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss.loss_sum, nothing.leaves))


def smaller_types(mesh: Mesh) -> None:
    """float32 is as near as its rounding; bfloat16 rows with float32 weights give those weights a float32 gradient."""
    case = replace(FULL, rows=40, vocabulary=400, padding=3, student_size=16, teacher_size=32, chunk_tokens=None)
    counts = uneven(case.rows, mesh.world_size)[0]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        inputs = tensors(case, dtype)
        own = part(case, inputs, mesh, counts)
        leaves = [own.hidden_RD, *(leaf.detach().float().requires_grad_() for leaf in own.leaves[1:])]
        student = replace(own.student, weight_VD=leaves[1], bias_V=leaves[2]).part(0, own.share.num_tokens)
        loss = fused_linear_across_ranks(
            own_rows(inputs, own), student, own.teacher, mix(case), own.share, counts=counts
        )
        gradients = torch.autograd.grad(loss.loss_sum * case.upstream, leaves)
        assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
        reference = expected(case, inputs)
        assert_gradients(gradients, reference.gradients, own, mesh.world_size, tolerance=tolerance)


def some(mesh: Mesh) -> int:
    return everything(mesh, every=5)


def everything(mesh: Mesh, *, every: int = 1) -> int:
    number = all_cases(mesh, every=every)
    other_calls(mesh)
    smaller_types(mesh)
    return number


@pytest.mark.parametrize("ranks", [1, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3))])
def test_values_and_gradients_are_the_textbooks_whatever_part_of_the_vocabulary_a_rank_has(ranks: int) -> None:
    assert run_ranks(f"{HERE}:everything", ranks=ranks) == [4 * len(SPREAD_DIVERGENCES)] * ranks


def refusals(mesh: Mesh) -> None:
    case = Case()
    inputs = tensors(case, torch.float64)
    own = part(case, inputs, mesh, [case.rows])
    rows = own_rows(inputs, own)
    arguments: dict[str, Any] = {"share": own.share, "counts": own.counts}
    with pytest.raises(InvalidRequest, match="student's head has 7 tokens; rank 0 has 40"):
        fused_linear_across_ranks(rows, own.student.part(0, 7), own.teacher, mix(case), **arguments)
    with pytest.raises(InvalidRequest, match=r"has 12 rows, and the counts are \[13\]"):
        fused_linear_across_ranks(rows, own.student, own.teacher, mix(case), own.share, counts=[13])
    with pytest.raises(InvalidRequest, match="whole vocabulary"):
        ordered = mix(replace(case, name="hierarchical_ranking"))
        fused_linear_across_ranks(rows, own.student, own.teacher, ordered, **arguments)


def test_what_is_not_this_ranks_part_is_refused() -> None:
    run_ranks(f"{HERE}:refusals", ranks=1)
