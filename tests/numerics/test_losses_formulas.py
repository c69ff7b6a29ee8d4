"""The fused loss against the textbook: values and gradients of hidden states, weight and bias."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdmesh.losses import OutputHead, fused_linear_cross_entropy
from tests.support import textbook_losses as textbook
from tests.support.loss_cases import (
    DIVERGENCES,
    FULL,
    SMOOTH,
    Case,
    assert_same,
    call,
    expected,
    heads,
    run,
    tensors,
)
from tests.support.loss_strategies import cases
from tests.support.textbook_losses import Transform


@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_are_the_textbooks(name: str) -> None:
    @settings(max_examples=25)
    @given(case=cases(name=name))
    def check(case: Case) -> None:
        inputs = tensors(case, torch.float64)
        assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-11)

    check()


KEPT = st.one_of(st.tuples(st.just("top_k"), st.integers(1, 320)), st.tuples(st.just("top_p"), st.floats(0.05, 0.99)))


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "sampled_reverse_kl"])
def test_a_truncated_divergence_is_the_textbooks_over_the_tokens_kept_and_one_for_the_others(name: str) -> None:
    @settings(max_examples=10)
    @given(case=cases(name=name, kept=KEPT))
    def check(case: Case) -> None:
        inputs = tensors(case, torch.float64)
        assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-11)

    check()


@pytest.mark.parametrize("name", SMOOTH)
def test_float32_is_as_near_as_its_rounding(name: str) -> None:
    @settings(max_examples=15)
    @given(case=cases(name=name))
    def check(case: Case) -> None:
        inputs = tensors(case, torch.float32)
        assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-4)

    check()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_option_at_once_is_the_textbooks(name: str) -> None:
    case = replace(FULL, name=name, knob=0.3)
    inputs = tensors(case, torch.float64)
    assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-12)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_student_and_teacher_may_differ_in_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = replace(FULL, rows=64)
    inputs = tensors(case, *dtypes)
    tolerance = 1e-5 if dtypes[0] is torch.float32 else 1e-2  # the gradient itself is rounded to bfloat16
    outcome = run(case, inputs)
    assert [gradient.dtype for gradient in outcome.gradients] == [dtypes[0]] * 3
    assert outcome.loss_sum.dtype is torch.float32
    assert_same(outcome, expected(case, inputs), tolerance=tolerance)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(0, 40),
    vocabulary=st.integers(2, 300),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.7]),
    is_weighted=st.booleans(),
    chunk_tokens=st.sampled_from([None, 1, 7, 16]),
)
def test_cross_entropy_alone_is_the_textbooks(
    seed: int,
    rows: int,
    vocabulary: int,
    softcap: float | None,
    scale: float,
    is_weighted: bool,
    chunk_tokens: int | None,
) -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden_RD, weight_VD, bias_V = normal(rows, 5), normal(vocabulary, 5), normal(vocabulary)
    leaves = [leaf.requires_grad_() for leaf in (hidden_RD, weight_VD, bias_V)]
    labels_R = torch.arange(rows) % vocabulary
    token_weight_R = torch.linspace(0, 2, rows, dtype=torch.float64) if is_weighted else None
    head = OutputHead(weight_VD=weight_VD, bias_V=bias_V, logit_scale=scale, logit_softcap=softcap)
    loss = fused_linear_cross_entropy(
        hidden_RD, head, labels_R, token_weight_R=token_weight_R, chunk_tokens=chunk_tokens
    )
    reference_R = textbook.cross_entropy(
        textbook.logits(hidden_RD, weight_VD, bias_V, Transform(scale=scale, softcap=softcap)), labels_R
    )
    reference_sum = (reference_R if token_weight_R is None else reference_R * token_weight_R).sum()
    torch.testing.assert_close(loss.cross_entropy_R, reference_R.detach())
    torch.testing.assert_close(loss.loss_sum, reference_sum)
    assert loss.divergence_R.shape == loss.top1_agreement_R.shape == (0,)
    actual = torch.autograd.grad(loss.loss_sum * 3, leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(reference_sum * 3, leaves, materialize_grads=True))


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in ("adaptive_kl", "sampled_reverse_kl")])
def test_gradcheck_passes(name: str) -> None:
    case = replace(FULL, rows=5, vocabulary=9, padding=0, name=name)
    inputs = tensors(case, torch.float64)

    def loss(*_: Tensor) -> Tensor:
        return call(case, inputs).loss_sum

    assert torch.autograd.gradcheck(loss, tuple(inputs.leaves))


def test_a_models_divergence_from_itself_is_zero_in_float32() -> None:
    for name in (name for name in DIVERGENCES if name != "top1_cross_entropy"):
        case = Case(name=name, rows=200, vocabulary=1000, student_size=32, spread=4.0, ce_weight=0.0)
        inputs = tensors(case, torch.float32)
        head, _ = heads(case, inputs)
        same = replace(
            inputs, teacher_hidden_RE=inputs.student_hidden_RD.detach(), teacher_weight_VE=head.weight_VD.detach()
        )
        outcome = run(case, same)
        amplified = 1 / abs(case.params["order"] - 1) if name == "renyi" else 1
        assert outcome.divergence_R.abs().max() < 1e-6 * amplified
        assert call(case, same).top1_agreement_R.min() == 1
        assert all(gradient.abs().max() < 1e-5 for gradient in outcome.gradients)


def test_top1_agreement_is_that_of_the_logits() -> None:
    for vocabulary in (128 * 5, 128 * 5 + 60, 97):  # runs of tokens that fit, that do not, one run
        case = Case(rows=300, vocabulary=vocabulary, student_size=3, teacher_size=3, seed=5)
        inputs = tensors(case, torch.float64)
        # A teacher that is a noisy student: agreement on some rows only.
        teacher_RE = inputs.student_hidden_RD.detach() + 0.3 * inputs.teacher_hidden_RE
        inputs = replace(inputs, teacher_hidden_RE=teacher_RE, teacher_weight_VE=inputs.student_weight_VD.detach())
        student, teacher = heads(case, inputs)
        agreement_R = student.logits(inputs.student_hidden_RD).argmax(-1) == teacher.logits(teacher_RE).argmax(-1)
        assert 0.1 < agreement_R.double().mean() < 0.9
        assert torch.equal(call(case, inputs).top1_agreement_R, agreement_R.double())


@pytest.mark.parametrize("top_k", [1, 8, 90])
def test_topk_overlap_is_that_of_the_sorted_logits(top_k: int) -> None:
    for vocabulary in (128 * 5, 128 * 5 + 60, 97):  # as above
        case = Case(rows=100, vocabulary=vocabulary, student_size=3, teacher_size=3, seed=5)
        inputs = tensors(case, torch.float64)
        teacher_RE = inputs.student_hidden_RD.detach() + 0.3 * inputs.teacher_hidden_RE
        inputs = replace(inputs, teacher_hidden_RE=teacher_RE, teacher_weight_VE=inputs.student_weight_VD.detach())
        student, teacher = heads(case, inputs)
        best = [
            logits_RV.sort(-1, descending=True).indices[:, :top_k]
            for logits_RV in (student.logits(inputs.student_hidden_RD), teacher.logits(teacher_RE))
        ]
        shared_R = (best[0].unsqueeze(1) == best[1].unsqueeze(2)).any(-1).double().mean(-1)
        assert 0.1 < shared_R.mean() < 0.999
        asked, plain = call(case, inputs, top_k=top_k), call(case, inputs)
        torch.testing.assert_close(asked.topk_overlap_R, shared_R)
        assert torch.equal(asked.loss_sum, plain.loss_sum)
        assert len(plain.topk_overlap_R) == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_entropies_are_the_textbooks_and_change_nothing_else(name: str) -> None:
    case = replace(FULL, name=name, rows=300, vocabulary=700)
    inputs = tensors(case, torch.float64)
    asked, plain = call(case, inputs, with_entropies=True), call(case, inputs)
    for found_R, head, hidden in zip(
        (asked.student_entropy_R, asked.teacher_entropy_R),
        heads(case, inputs),
        (inputs.student_hidden_RD, inputs.teacher_hidden_RE),
        strict=True,
    ):
        p_RV = textbook.softmax(head.logits(hidden), case.temperature)
        torch.testing.assert_close(found_R, -(p_RV * p_RV.log()).sum(-1), rtol=1e-11, atol=1e-11)
    assert torch.equal(asked.loss_sum, plain.loss_sum)
    of_asked, of_plain = (torch.autograd.grad(loss.loss_sum, inputs.leaves) for loss in (asked, plain))
    assert all(torch.equal(one, other) for one, other in zip(of_asked, of_plain, strict=True))
    assert len(plain.student_entropy_R) == len(plain.teacher_entropy_R) == 0
