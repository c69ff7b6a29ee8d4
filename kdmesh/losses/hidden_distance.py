"""How far hidden states are from others, row by row, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (student_CE, teacher_CE) of one chunk, both at least float32 -> [C] distances, and [C, E] their gradients.
_Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_CHUNK_ELEMENTS = 2**22


def mean_squared_distance(student_RE: Tensor, teacher_RE: Tensor) -> Tensor:
    """Mean over columns of the squared difference.

    Args:
        student_RE: any float dtype; carries the gradient, of which as many bytes are kept for the backward pass.
        teacher_RE: never carries one, and is not kept.

    Returns:
        [R] at least float32, >= 0.
    """
    return _Distance.apply(student_RE, teacher_RE, _mean_squared)  # type: ignore[no-untyped-call, no-any-return]


def cosine_distance(student_RE: Tensor, teacher_RE: Tensor) -> Tensor:
    """1 - cos of the angle between two rows: arguments as mean_squared_distance.

    Returns:
        [R] at least float32, from 0 to 2; 1, without a gradient, where a row is all zeros.
    """
    return _Distance.apply(student_RE, teacher_RE, _cosine)  # type: ignore[no-untyped-call, no-any-return]


class _Distance(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, so that nothing wider than the student's is kept."""

    @staticmethod
    def forward(ctx: Any, student_RE: Tensor, teacher_RE: Tensor, form: _Form) -> Tensor:
        """[R]"""
        dtype = torch.promote_types(student_RE.dtype, torch.float32)
        rows = max(1, _CHUNK_ELEMENTS // student_RE.shape[1])
        distance_R = student_RE.new_empty(len(student_RE), dtype=dtype)
        gradient_RE = torch.empty_like(student_RE)
        for first in range(0, len(student_RE), rows):
            some = slice(first, first + rows)
            distance_R[some], gradient_RE[some] = form(student_RE[some].to(dtype), teacher_RE[some].to(dtype))
        ctx.save_for_backward(gradient_RE)
        return distance_R

    @staticmethod
    def backward(ctx: Any, factor_R: Tensor) -> tuple[Tensor, None, None]:
        """The gradient times the factor of each row, which is not rounded to the student's dtype."""
        (gradient_RE,) = ctx.saved_tensors
        return torch.mul(gradient_RE, factor_R[:, None], out=torch.empty_like(gradient_RE)), None, None


def _mean_squared(student_CE: Tensor, teacher_CE: Tensor) -> tuple[Tensor, Tensor]:
    difference_CE = student_CE - teacher_CE
    return difference_CE.square().mean(-1), difference_CE * (2 / student_CE.shape[1])


def _cosine(student_CE: Tensor, teacher_CE: Tensor) -> tuple[Tensor, Tensor]:
    inverse_C1, teacher_inverse_C1 = (_inverse_norm(each) for each in (student_CE, teacher_CE))
    student_CE, teacher_CE = student_CE * inverse_C1, teacher_CE * teacher_inverse_C1
    cosine_C1 = (student_CE * teacher_CE).sum(-1, keepdim=True)
    return 1 - cosine_C1[:, 0], (student_CE * cosine_C1 - teacher_CE) * inverse_C1


def _inverse_norm(rows_CE: Tensor) -> Tensor:
    """[C, 1] 0 where a row is all zeros."""
    norm_C1 = rows_CE.norm(dim=-1, keepdim=True)
    return torch.where(norm_C1 > 0, 1 / norm_C1, 0)
