"""A matrix times a number that only the GPU knows, in one sweep of whole vectors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _scale(matrix, factor, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(matrix + index, mask=index < size, other=0.0) * tl.load(factor)
    tl.store(out + index, product.to(out.dtype.element_ty), mask=index < size)


def scaled_by_kernel(matrix: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix * factor in `dtype`, rounded once; `matrix` is contiguous and of the factor's dtype, `factor` [].

    torch.mul with such a result does not read or write whole vectors, and takes three times as long.
    """
    out = torch.empty_like(matrix, dtype=dtype)
    grid = (triton.cdiv(matrix.numel(), _BLOCK),)
    with torch.cuda.device_of(matrix):
        _scale[grid](matrix, factor, out, matrix.numel(), BLOCK=_BLOCK, num_warps=8)
    return out
