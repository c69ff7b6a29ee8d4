"""The matrix products of the fused loss, with float32 results from bfloat16 operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdmesh.losses import brgemm
from kdmesh.losses.gpu.form import kernel_runs_on
from kdmesh.losses.threads import run_each
from kdmesh.losses.workspace import Workspace
from kdmesh.processor import multiplies

# Rows of a weight that are cast, multiplied or scaled at a time on a CPU: few enough to stay in its cache.
_SLAB_ROWS = 2048
_GRADIENT_SLAB_ROWS = 1024
_KERNEL_SLAB_ROWS = 256


def spans(length: int, longest: int, *, multiple: int = 16) -> list[slice]:
    """Contiguous slices that cover `length`, none longer than `longest`, as equal as multiples allow."""
    if length == 0:
        return []
    count = -(-length // longest)
    size = -(-length // count)
    size = min(longest, -(-size // multiple) * multiple)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def logits_into(out_BV: Tensor, hidden_BD: Tensor, weight_VD: Tensor, workspace: Workspace) -> None:
    """Overwrite `out_BV` with hidden @ weight.T; bfloat16 operands give float32 sums that are never rounded."""
    if hidden_BD.is_cuda and hidden_BD.dtype is torch.bfloat16:
        torch.mm(hidden_BD, weight_VD.T, out_dtype=torch.float32, out=out_BV)
    elif _has_kernel(hidden_BD, weight_VD):

        def multiply(slab: slice) -> None:
            right_DS = brgemm.transposed(weight_VD[slab])
            brgemm.multiply_into(out_BV[:, slab], hidden_BD, right_DS)

        _on_threads(multiply, spans(len(weight_VD), _KERNEL_SLAB_ROWS))
    elif hidden_BD.dtype is torch.bfloat16:
        _logits_into_by_casts(out_BV, hidden_BD, weight_VD, workspace)
    else:
        torch.mm(hidden_BD, weight_VD.T, out=out_BV)


def hidden_gradient_into(out_CD: Tensor, logit_gradient_CV: Tensor, weight_VD: Tensor) -> None:
    """Overwrite `out_CD` with logit_gradient @ weight; in the operands' type, or in float32."""
    is_float32 = logit_gradient_CV.dtype is torch.float32
    if is_float32 and out_CD.dtype is torch.float32 and _has_kernel(out_CD, logit_gradient_CV, weight_VD):

        def multiply(rows: slice) -> None:
            brgemm.multiply_into(out_CD[rows], logit_gradient_CV[rows], weight_VD)

        _on_threads(multiply, spans(len(out_CD), -(-len(out_CD) // torch.get_num_threads())))
    elif out_CD.dtype is logit_gradient_CV.dtype and multiplies(logit_gradient_CV.dtype, logit_gradient_CV.device):
        torch.mm(logit_gradient_CV, weight_VD, out=out_CD)
    elif out_CD.is_cuda:
        torch.mm(logit_gradient_CV, weight_VD, out_dtype=out_CD.dtype, out=out_CD)
    elif not multiplies(logit_gradient_CV.dtype, logit_gradient_CV.device):
        _hidden_gradient_into_by_casts(out_CD, logit_gradient_CV, weight_VD)
    else:  # rounded once
        out_CD.copy_(torch.mm(logit_gradient_CV, weight_VD))


def weight_gradient_into(out_VD: Tensor, logit_gradient_CV: Tensor, hidden_CD: Tensor, *, adds: bool) -> None:
    """Overwrite `out_VD` with logit_gradient.T @ hidden, or add it; float32 where the operands are bfloat16."""
    if hidden_CD.is_cuda and hidden_CD.dtype is torch.bfloat16:
        torch.addmm(out_VD, logit_gradient_CV.T, hidden_CD, beta=int(adds), out_dtype=torch.float32, out=out_VD)
        return
    is_bfloat16 = hidden_CD.dtype is torch.bfloat16
    if not is_bfloat16 and not _has_kernel(hidden_CD, logit_gradient_CV):
        torch.addmm(out_VD, logit_gradient_CV.T, hidden_CD, beta=int(adds), out=out_VD)
        return
    # The transposed product: the gradient is the large operand, which to transpose takes longer than the product
    # itself; the few rows of the result are cheap to transpose.
    hidden_DC = hidden_CD.T.contiguous()

    def put(slab: slice, product_DS: Tensor) -> None:
        if adds:
            out_VD[slab].add_(product_DS.T)
        else:
            out_VD[slab].copy_(product_DS.T)

    def multiply(slab: slice) -> None:
        gradient_CS = logit_gradient_CV[:, slab].contiguous()
        product_DS = out_VD.new_empty(len(hidden_DC), gradient_CS.shape[1])
        brgemm.multiply_into(product_DS, hidden_DC, gradient_CS)
        put(slab, product_DS)

    if is_bfloat16:
        dtype = torch.bfloat16 if multiplies(hidden_DC.dtype, hidden_DC.device) else torch.float32
        hidden_DC = hidden_DC.to(dtype)
        for slab in spans(len(out_VD), _GRADIENT_SLAB_ROWS):
            put(slab, torch.mm(hidden_DC, logit_gradient_CV[:, slab].to(dtype)))
    else:
        _on_threads(multiply, spans(len(out_VD), _KERNEL_SLAB_ROWS))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, rounded once and without a float32 copy of the whole.

    May be `gradient` itself where the factor is known to be 1; only a CPU knows without a wait.
    """
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient.to(dtype)
    if kernel_runs_on(gradient.device) and gradient.dtype is factor.dtype and gradient.numel() > 0:
        from kdmesh.losses.gpu.scale_kernel import scaled_by_kernel  # Triton, which a CPU has no use for

        return scaled_by_kernel(gradient, factor, dtype)
    if gradient.dtype is dtype and dtype in (torch.float32, torch.float64):
        return gradient * factor
    result = torch.empty_like(gradient, dtype=dtype)
    for slab in spans(len(gradient), _SLAB_ROWS):
        result[slab].copy_(gradient[slab].to(factor.dtype) * factor)
    return result


def _hidden_gradient_into_by_casts(out_CD: Tensor, logit_gradient_CV: Tensor, weight_VD: Tensor) -> None:
    """As hidden_gradient_into, in float32 and rounded once."""
    sum_CD = out_CD.new_zeros(out_CD.shape, dtype=torch.float32)
    for slab in spans(len(weight_VD), _SLAB_ROWS):
        sum_CD.addmm_(logit_gradient_CV[:, slab].float(), weight_VD[slab].float())
    out_CD.copy_(sum_CD)


def _has_kernel(*matrices: Tensor) -> bool:
    """Whether brgemm takes all of them."""
    return all(brgemm.takes(matrix) for matrix in matrices)


def _on_threads(work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """Do all parts, each thread as many as any other."""

    def share(first: int) -> None:
        for part in parts[first::num_threads]:
            work(part)

    num_threads = torch.get_num_threads()
    run_each([partial(share, first) for first in range(min(num_threads, len(parts)))])


def _logits_into_by_casts(out_BV: Tensor, hidden_BD: Tensor, weight_VD: Tensor, workspace: Workspace) -> None:
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
