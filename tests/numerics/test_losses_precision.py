"""Logits of bfloat16 models are float32, so that a gradient near convergence is not rounding noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdmesh.losses import OutputHead, build_divergence, fused_linear_divergence, matmul
from kdmesh.losses.matmul import hidden_gradient_into, logits_into, scaled, weight_gradient_into
from kdmesh.losses.workspace import Workspace
from tests.support import textbook_losses as textbook
from tests.support.loss_cases import PARAMS, SMOOTH, Case, expected, run, tensors
from tests.support.relative_error import relative_error


def near_teacher(distance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A bfloat16 student (hidden, weight) whose logits are a noisy version of its teacher's, which reach about 24."""
    generator = torch.Generator().manual_seed(1)
    teacher_RD = torch.randn(64, 128, generator=generator)
    weight_VD = torch.randn(4000, 128, generator=generator) * 5.5 / 128**0.5
    student_RD = teacher_RD + distance * torch.randn(64, 128, generator=generator)
    hidden_RD, head_VD = student_RD.bfloat16().requires_grad_(), weight_VD.bfloat16().requires_grad_()
    return hidden_RD, head_VD, teacher_RD.bfloat16(), weight_VD.bfloat16()


def errors_of(
    name: str, hidden_RD: Tensor, weight_VD: Tensor, teacher_RD: Tensor, teacher_VD: Tensor
) -> tuple[float, float, float]:
    """Mean divergence, and the relative error of d hidden: ours, and with logits rounded to bfloat16."""
    params = PARAMS[name](0.5)
    leaf_RD = hidden_RD.detach().double().requires_grad_()
    q_RV = textbook.softmax(leaf_RD @ weight_VD.detach().double().T)
    p_RV = textbook.softmax(teacher_RD.double() @ teacher_VD.double().T)
    values_R = textbook.divergence(name, q_RV, p_RV, params, None)
    (reference,) = torch.autograd.grad(values_R.sum(), leaf_RD)

    loss = fused_linear_divergence(
        hidden_RD,
        OutputHead(weight_VD=weight_VD),
        teacher_RD,
        OutputHead(weight_VD=teacher_VD),
        divergence=build_divergence(name, params),
    )
    (ours,) = torch.autograd.grad(loss.loss_sum, hidden_RD)

    logits_RV = (hidden_RD.detach() @ weight_VD.detach().T).double().requires_grad_()
    rounded_R = textbook.divergence(
        name, textbook.softmax(logits_RV), textbook.softmax((teacher_RD @ teacher_VD.T).double()), params, None
    )
    (dlogits_RV,) = torch.autograd.grad(rounded_R.sum(), logits_RV)
    theirs = dlogits_RV @ weight_VD.detach().double()
    return values_R.mean().item(), relative_error(ours, reference), relative_error(theirs, reference)


@pytest.mark.parametrize("name", [name for name in SMOOTH if name != "sampled_reverse_kl"])
@pytest.mark.parametrize("distance", [0.3, 0.03, 0.01])
def test_the_gradient_is_right_to_its_own_rounding_however_near_the_teacher(name: str, distance: float) -> None:
    divergence, ours, with_rounded_logits = errors_of(name, *near_teacher(distance))
    assert divergence > 0
    assert ours < 4e-3
    assert with_rounded_logits > 4 * ours


def test_products_of_bfloat16_matrices_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden_RD = torch.randn(70, 300, generator=generator).bfloat16()
    weight_VD = torch.randn(5000, 300, generator=generator).bfloat16()
    out_RV = torch.empty(70, 5000)
    logits_into(out_RV, hidden_RD, weight_VD, Workspace())
    exact_RV = hidden_RD.double() @ weight_VD.double().T
    assert (out_RV - exact_RV).abs().max() < 2e-6 * exact_RV.abs().max()


def test_the_precision_of_other_float32_products_is_left_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    exact = a.double() @ b.double()
    run(Case(), tensors(Case(), torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    assert (a @ b - exact).abs().max() < 1e-4


def test_a_processor_without_bfloat16_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "multiplies", lambda dtype, device: dtype is torch.float32)
    generator = torch.Generator().manual_seed(3)
    shapes = ((40, 5000), (5000, 24), (40, 24))
    gradient_CV, weight_VD, hidden_CD = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    hidden_gradient_CD, weight_gradient_VD = torch.empty_like(hidden_CD), torch.ones(5000, 24)
    hidden_gradient_into(hidden_gradient_CD, gradient_CV, weight_VD)
    weight_gradient_into(weight_gradient_VD, gradient_CV, hidden_CD, adds=True)
    exact_CD = gradient_CV.double() @ weight_VD.double()
    torch.testing.assert_close(hidden_gradient_CD.double(), exact_CD, rtol=2.0**-8, atol=1e-3)
    exact_VD = 1 + gradient_CV.double().T @ hidden_CD.double()
    torch.testing.assert_close(weight_gradient_VD.double(), exact_VD, rtol=1e-5, atol=1e-5)


def test_the_weight_gradient_does_not_lose_small_chunks() -> None:
    hidden_CD = torch.full((16, 8), 2.0**-8, dtype=torch.bfloat16)
    gradient_CV = torch.full((16, 32), 2.0**-4, dtype=torch.bfloat16)
    out_VD = torch.ones(32, 8)
    for _ in range(64):  # each adds 2^-8, which a bfloat16 sum that is at 1 would drop
        weight_gradient_into(out_VD, gradient_CV, hidden_CD, adds=True)
    assert torch.equal(out_VD, torch.full((32, 8), 1.25))


def test_scaling_rounds_once() -> None:
    gradient = torch.randn(5000, 3)
    factor = torch.tensor(1 / 3)
    assert torch.equal(scaled(gradient, factor, torch.bfloat16), (gradient * factor).bfloat16())
    assert torch.equal(scaled(gradient.bfloat16(), factor, torch.bfloat16), (gradient.bfloat16() * factor).bfloat16())
    assert scaled(gradient, torch.tensor(1.0), torch.float32) is gradient


def test_float16_rows_are_not_truncated_to_bfloat16() -> None:
    case = Case(rows=20, vocabulary=50)
    inputs = tensors(case, torch.float32, torch.float16)
    outcome = run(case, inputs)
    assert relative_error(outcome.divergence_R, expected(case, inputs).divergence_R) < 1e-5
    student = tensors(case, torch.float16)
    gradients = run(case, student).gradients
    for ours, reference in zip(gradients, expected(case, student).gradients, strict=True):
        assert ours.dtype is torch.float16
        assert relative_error(ours, reference) < 1e-3


def test_autocast_changes_nothing() -> None:
    case = replace(Case(), rows=20)
    inputs = tensors(case, torch.float32)
    plain = run(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(case, inputs)
    assert torch.equal(plain.loss_sum, cast.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients, cast.gradients, strict=True))
