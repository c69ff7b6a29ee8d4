"""Finds the least likely tokens that hold a given probability together, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


def least_likely(p_CV: Tensor, mass: float) -> Tensor:
    """[C, V] bool: the tokens at or below the greatest probability at which those are `mass` or less together.

    So tokens of one probability are all in or all out. Halves the interval between the least and the greatest
    probability as often as there are bits.

    Args:
        p_CV: float32 or float64, not negative.
    """
    # As integers, the bits of floats that are not negative are in the order of the floats.
    dtype, num_bits = _BITS[p_CV.dtype]
    bits_CV = p_CV.view(dtype)
    inside_C1 = bits_CV.amin(-1, keepdim=True) - 1
    outside_C1 = bits_CV.amax(-1, keepdim=True) + 1
    for _ in range(num_bits):
        middle_C1 = inside_C1 + (outside_C1 - inside_C1) // 2
        fits_C1 = (p_CV * (bits_CV <= middle_C1)).sum(-1, keepdim=True) <= mass  # once found, middle is inside
        inside_C1 = torch.where(fits_C1, middle_C1, inside_C1)
        outside_C1 = torch.where(fits_C1, outside_C1, middle_C1)
    return bits_CV <= inside_C1
