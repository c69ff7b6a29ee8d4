"""The matrix products of the fused loss, with float32 results from bfloat16 operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdmesh.losses.workspace import Workspace

# Rows of a weight that are cast, multiplied or scaled at a time on a CPU: few enough to stay in its cache.
_SLAB_ROWS = 2048
_GRADIENT_SLAB_ROWS = 1024


def spans(length: int, longest: int) -> list[slice]:
    """Contiguous slices that cover `length`, none longer than `longest`, as equal as multiples of 16 allow."""
    if length == 0:
        return []
    count = -(-length // longest)
    size = -(-length // count)
    size = min(longest, -(-size // 16) * 16)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def logits_into(out_BV: Tensor, hidden_BD: Tensor, weight_VD: Tensor, workspace: Workspace) -> None:
    """Overwrite `out_BV` with hidden @ weight.T; bfloat16 operands give float32 sums that are never rounded."""
    if hidden_BD.dtype is not torch.bfloat16:
        torch.mm(hidden_BD, weight_VD.T, out=out_BV)
    elif hidden_BD.is_cuda:
        torch.mm(hidden_BD, weight_VD.T, out_dtype=torch.float32, out=out_BV)
    else:
        _logits_into_on_cpu(out_BV, hidden_BD, weight_VD, workspace)


def weight_gradient_into(out_VD: Tensor, logit_gradient_CV: Tensor, hidden_CD: Tensor, *, adds: bool) -> None:
    """Overwrite `out_VD` with logit_gradient.T @ hidden, or add it; float32 where the operands are bfloat16."""
    if hidden_CD.dtype is not torch.bfloat16:
        torch.addmm(out_VD, logit_gradient_CV.T, hidden_CD, beta=int(adds), out=out_VD)
    elif hidden_CD.is_cuda:
        torch.addmm(out_VD, logit_gradient_CV.T, hidden_CD, beta=int(adds), out_dtype=torch.float32, out=out_VD)
    else:
        # The transposed product: oneDNN would pack the transposed gradient, which is the large operand, at twice the
        # price of the product itself; the few rows of its result are cheap to transpose.
        hidden_DC = hidden_CD.T.contiguous()
        for slab in spans(len(out_VD), _GRADIENT_SLAB_ROWS):
            product_SD = torch.mm(hidden_DC, logit_gradient_CV[:, slab]).T
            if adds:
                out_VD[slab].add_(product_SD)
            else:
                out_VD[slab].copy_(product_SD)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, rounded once and without a float32 copy of the whole.

    May be `gradient` itself where the factor is known to be 1; only a CPU knows without a wait.
    """
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient.to(dtype)
    if gradient.dtype is dtype and dtype in (torch.float32, torch.float64):
        return gradient * factor
    result = torch.empty_like(gradient, dtype=dtype)
    for slab in spans(len(gradient), _SLAB_ROWS):
        result[slab].copy_(gradient[slab].to(factor.dtype) * factor)
    return result


def _logits_into_on_cpu(out_BV: Tensor, hidden_BD: Tensor, weight_VD: Tensor, workspace: Workspace) -> None:
    """As logits_into. No CPU operator takes bfloat16 and returns float32, so the operands are cast, exactly, and
    oneDNN is allowed to multiply them in bfloat16, which is what they are: no product is rounded."""
    size, device = hidden_BD.shape[1], hidden_BD.device
    slabs = spans(len(weight_VD), _SLAB_ROWS)
    cast_BD = workspace.matrix("hidden", len(hidden_BD), size, dtype=torch.float32, device=device).copy_(hidden_BD)
    slab_SD = workspace.matrix("weight", slabs[0].stop, size, dtype=torch.float32, device=device)
    with _float32_products_in_bfloat16():
        for slab in slabs:
            cast_SD = slab_SD[: slab.stop - slab.start].copy_(weight_VD[slab])
            torch.mm(cast_BD, cast_SD.T, out=out_BV[:, slab])


@contextmanager
def _float32_products_in_bfloat16() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices with bfloat16 instructions, where the processor has them.

    The switch is the process's: a float32 product that another thread computes meanwhile is rounded.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
