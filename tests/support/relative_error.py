"""How far a tensor is from what it should be."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, by its norm; 0 where both are 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm()
    return 0.0 if norm == 0 and actual.norm() == 0 else ((actual - expected).norm() / norm).item()
