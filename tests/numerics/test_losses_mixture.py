"""The fused loss against a mixture of several teachers' distributions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from kdmesh.errors import InvalidRequest
from kdmesh.losses import MixedTeacher, OutputHead, engine
from tests.support import loss_cases, textbook_losses
from tests.support.loss_cases import FULL, Case, assert_same
from tests.support.loss_strategies import cases, further
from tests.support.mixture_cases import Further, MixtureTensors, call, expected, run, target, tensors
from tests.support.tensor_watch import TensorWatch
from tests.support.textbook_losses import Transform

DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon"]
TWO = [
    Further(size=7, share=0.5, own_tokens=3, has_bias=True, transform=Transform(scale=0.7, softcap=5.0)),
    Further(size=3, share=2.0, own_tokens=11, transform=Transform(scale=1.4)),
]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_are_the_textbooks(name: str) -> None:
    @settings(max_examples=30)
    @given(case=cases(name=name), others=further())
    def check(case: Case, others: list[Further]) -> None:
        inputs = tensors(case, others, torch.float64)
        assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-11)

    check()


@pytest.mark.parametrize("name", loss_cases.DIVERGENCES)
@pytest.mark.parametrize("kept", [None, ("top_k", 7)])
def test_every_divergence_whole_or_truncated_is_the_textbooks(name: str, kept: tuple[str, float] | None) -> None:
    case = replace(FULL, name=name, kept=None if name.startswith("sampled") else kept, knob=0.3)
    inputs = tensors(case, TWO, torch.float64)
    assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-11)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_is_as_near_as_its_rounding(name: str) -> None:
    @settings(max_examples=12)
    @given(case=cases(name=name), others=further())
    def check(case: Case, others: list[Further]) -> None:
        inputs = tensors(case, others, torch.float32)
        assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-4)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_any_other_chunk_size(dtype: torch.dtype) -> None:
    case = replace(FULL, rows=150, vocabulary=200)
    inputs = tensors(case, TWO, dtype)
    whole = run(replace(case, chunk_tokens=150), inputs)
    tolerance = 2e-6 if dtype is torch.float32 else 2**-7  # a bfloat16 gradient is rounded
    for chunk_tokens in (None, 1, 15, 16, 64, 149, 10_000):
        assert_same(run(replace(case, chunk_tokens=chunk_tokens), inputs), whole, tolerance=tolerance)


@pytest.mark.parametrize("sizes", [(100, 30, 7, 1), (37, 16, 16, 2), (150, 150, 2, 4)])
def test_blocks_tiles_and_threads_of_any_number_give_the_textbooks_gradient(
    sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, block, tile, num_threads = sizes
    fixed = engine.Sizes(chunk_rows=chunk, block_rows=block, tile_rows=tile, num_threads=num_threads)
    monkeypatch.setattr(engine.Sizes, "choose", staticmethod(lambda *_, **__: fixed))
    case = replace(FULL, rows=150)
    inputs = tensors(case, TWO, torch.float64)
    assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_weight_zero_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = tensors(FULL, TWO, dtype)
    absent = [MixedTeacher(hidden_RE=each.hidden_RE, head=each.head, weight=0.0) for each in inputs.further]
    mixed, alone = run(FULL, replace(inputs, further=absent)), loss_cases.run(FULL, inputs.own)
    assert torch.equal(mixed.loss_sum, alone.loss_sum)
    assert torch.equal(mixed.divergence_R, alone.divergence_R)
    assert all(torch.equal(one, other) for one, other in zip(mixed.gradients, alone.gradients, strict=True))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_mixture_of_one_distribution_is_that_distribution(name: str) -> None:
    case = replace(FULL, name=name)
    own = loss_cases.tensors(case, torch.float64)
    _, head = loss_cases.heads(case, own)
    same = [MixedTeacher(hidden_RE=own.teacher_hidden_RE, head=head, weight=weight) for weight in (0.2, 0.5)]
    mixed = run(case, MixtureTensors(own=own, further=same))
    assert_same(mixed, loss_cases.run(case, own), tolerance=1e-12)


def test_agreement_overlap_and_entropy_are_those_of_the_mixture() -> None:
    case = replace(FULL, rows=200, vocabulary=300)
    inputs = tensors(case, TWO, torch.float64)
    loss, p_RV = call(case, inputs, with_entropies=True, top_k=8), target(case, inputs)
    student, _ = loss_cases.heads(case, inputs.own)
    q_RV = student.logits(inputs.own.student_hidden_RD)
    assert torch.equal(loss.top1_agreement_R, (p_RV.argmax(-1) == q_RV.argmax(-1)).double())
    best = [values_RV.topk(8).indices for values_RV in (q_RV, p_RV)]
    shared_R = (best[0].unsqueeze(1) == best[1].unsqueeze(2)).any(-1).double().mean(-1)
    torch.testing.assert_close(loss.topk_overlap_R, shared_R)
    torch.testing.assert_close(loss.teacher_entropy_R, -(p_RV * p_RV.log()).sum(-1), rtol=1e-11, atol=1e-11)


def test_teachers_that_exclude_each_others_tokens_mix_without_an_infinity() -> None:
    weight_VD = torch.tensor([[1e4], [-1e4], [0.0]])
    one, other = torch.ones(2, 1), -torch.ones(2, 1)
    head = OutputHead(weight_VD=weight_VD)
    student = torch.zeros(2, 1, requires_grad=True)
    own = loss_cases.Tensors(
        student_hidden_RD=student,
        student_weight_VD=weight_VD.clone().requires_grad_(),
        student_bias_V=None,
        teacher_hidden_RE=one,
        teacher_weight_VE=weight_VD,
        teacher_bias_V=None,
        labels_R=None,
        token_weight_R=None,
    )
    mixture = MixtureTensors(own=own, further=[MixedTeacher(hidden_RE=other, head=head, weight=0.5)])
    case = Case(rows=2, vocabulary=3, has_labels=False)
    # KL((1/2, 1/2, 0) || (1/3, 1/3, 1/3))
    torch.testing.assert_close(run(case, mixture).divergence_R, torch.full((2,), 1.5).log())


def test_no_tensor_is_larger_than_a_chunk_or_a_weight() -> None:
    case = Case(rows=400, vocabulary=500, ce_weight=0.1, temperature=2.0, chunk_tokens=32)
    inputs = tensors(case, TWO, torch.float32)
    known = [tensor for each in inputs.further for tensor in (each.hidden_RE, each.head.weight_VD)]
    with TensorWatch([*inputs.own.leaves, *known]) as watch:
        call(case, inputs).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert watch.largest_bytes <= 4 * 32 * case.vocabulary


@pytest.mark.parametrize("weights", [(0.5, 0.5), (-0.1, 0.5), (1.2,), (float("nan"),)])
def test_weights_that_leave_nothing_for_the_first_teacher_are_refused(weights: tuple[float, ...]) -> None:
    inputs = tensors(FULL, TWO, torch.float32)
    teachers = [
        MixedTeacher(hidden_RE=each.hidden_RE, head=each.head, weight=weight)
        for each, weight in zip(inputs.further, weights, strict=False)
    ]
    with pytest.raises(InvalidRequest, match="their sum less than 1"):
        call(FULL, replace(inputs, further=teachers))


def test_a_teacher_over_other_tokens_or_rows_is_refused() -> None:
    inputs = tensors(FULL, TWO, torch.float32)
    first = inputs.further[0]
    few = OutputHead(weight_VD=torch.randn(FULL.vocabulary, 5))
    for hidden_RE, head, reason in (
        (first.hidden_RE, few, "its head needs"),
        (torch.randn(3, 5), few, "has 3 rows, the student's hidden states have 33"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            call(FULL, replace(inputs, further=[MixedTeacher(hidden_RE=hidden_RE, head=head, weight=0.5)]))


def test_the_textbooks_mixture_is_a_distribution() -> None:
    p_RV = target(FULL, tensors(FULL, TWO, torch.float64))
    torch.testing.assert_close(p_RV.sum(-1), torch.ones(FULL.rows, dtype=torch.float64))
    assert textbook_losses.kullback_leibler(p_RV, p_RV).abs().max() == 0
