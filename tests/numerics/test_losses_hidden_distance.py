"""Distances between hidden states are the textbook's, in value and gradient, and keep one tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cosine_similarity

from kdmesh.losses import cosine_distance, hidden_distance, mean_squared_distance

Distance = Callable[[Tensor, Tensor], Tensor]


def textbook_mse(student_RE: Tensor, teacher_RE: Tensor) -> Tensor:
    return torch.stack([torch.nn.functional.mse_loss(*pair) for pair in zip(student_RE, teacher_RE, strict=True)])


def textbook_cosine(student_RE: Tensor, teacher_RE: Tensor) -> Tensor:
    return 1 - cosine_similarity(student_RE, teacher_RE)


BOTH = pytest.mark.parametrize(
    ("distance", "textbook"), [(mean_squared_distance, textbook_mse), (cosine_distance, textbook_cosine)]
)


def rows(number: int = 50, width: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(number, width, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(number, generator=generator, dtype=torch.float64)
    student, teacher = (3 * student).to(dtype), (teacher + student).to(dtype)
    return student.requires_grad_(), teacher, weights


@BOTH
@pytest.mark.parametrize("chunk_elements", [1, 24 * 7, 10**6])
def test_value_and_gradient_are_the_textbooks_however_rows_are_cut(
    monkeypatch: pytest.MonkeyPatch, distance: Distance, textbook: Distance, chunk_elements: int
) -> None:
    monkeypatch.setattr(hidden_distance, "_CHUNK_ELEMENTS", chunk_elements)
    student, teacher, weights = rows()
    found = distance(student, teacher)
    (gradient,) = torch.autograd.grad((found * weights).sum(), student)
    expected = textbook(student, teacher)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


@BOTH
def test_16_bits_are_computed_with_in_float32_and_keep_a_gradient_of_16_bits(
    distance: Distance, textbook: Distance
) -> None:
    student, teacher, weights = rows(dtype=torch.bfloat16)
    weights = torch.full_like(weights, 1 + 3 * 2**-10).float()  # which bfloat16 would take for 1
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = distance(student, teacher)
    assert found.dtype is torch.float32
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [(student.shape, torch.bfloat16)]
    exact = student.detach().double().requires_grad_()
    expected = textbook(exact, teacher.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((found * weights).sum(), student)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), exact)
    error = (gradient.double() - wanted).norm() / wanted.norm()
    assert error < 2**-8
    # Rounding is of each element by itself: the length of the whole, which is what the weight is, stays.
    along = (gradient.double() * wanted).sum() / wanted.square().sum()
    assert along == pytest.approx(1, abs=2**-11)


def test_rows_of_zeros_have_a_distance_and_no_gradient() -> None:
    student, teacher, _ = rows(3)
    with torch.no_grad():
        student[0] = 0
        teacher[1] = 0
    found = cosine_distance(student, teacher)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found[:2].tolist() == [1, 1]
    assert gradient[:2].abs().max() == 0 < gradient[2].abs().max()
