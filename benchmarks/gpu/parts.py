"""What a step is made of, one by one: cuBLAS's products, the row kernel, how exact the loss is, attention."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import loss_inputs
from benchmarks.gpu.scale import Scale, median_ms, normal
from kdmesh.losses import OutputHead, Workspace, forward_kl
from kdmesh.losses.gpu import rows as kernel_rows
from kdmesh.losses.gpu.form import KernelForm, Op
from kdmesh.losses.gpu.rows import KernelRows
from kdmesh.losses.matmul import hidden_gradient_into, logits_into, weight_gradient_into
from kdmesh.losses.rows import Mix, StudentSide

T = TypeVar("T")

_TILINGS = ((2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))


def measure_products(scale: Scale) -> dict[str, object]:
    """TFLOP/s of a chunk's products as the loss does them, and as plain bfloat16 ones."""
    rows, columns, size = scale.chunk_rows, scale.vocabulary, scale.student_size
    hidden_CD, weight_VD = normal(rows, size, scale, seed=1), normal(columns, size, scale, seed=2)
    padded = -(-columns // 128) * 128
    logits_CP = torch.zeros(rows, padded, device=scale.device)
    in_place_CV, own_CV = logits_CP.view(torch.bfloat16)[:, :columns], normal(rows, columns, scale, deviation=0.01)
    out_CD, weight_gradient_VD = torch.empty_like(hidden_CD), torch.zeros(columns, size, device=scale.device)
    workspace, plain_CV = Workspace(), torch.empty_like(own_CV)
    calls = {
        "logits, float32 into padded rows": partial(
            logits_into, logits_CP[:, :columns], hidden_CD, weight_VD, workspace
        ),
        "logits, bfloat16": partial(torch.mm, hidden_CD, weight_VD.T, out=plain_CV),
        "hidden gradient, in place": partial(hidden_gradient_into, out_CD, in_place_CV, weight_VD),
        "hidden gradient, own matrix": partial(hidden_gradient_into, out_CD, own_CV, weight_VD),
        "weight gradient, in place, float32 sums": partial(
            weight_gradient_into, weight_gradient_VD, in_place_CV, hidden_CD, adds=True
        ),
        "weight gradient, own matrix, float32 sums": partial(
            weight_gradient_into, weight_gradient_VD, own_CV, hidden_CD, adds=True
        ),
        "weight gradient, own matrix, overwritten": partial(
            weight_gradient_into, weight_gradient_VD, own_CV, hidden_CD, adds=False
        ),
    }
    flop = 2 * rows * columns * size
    figures: dict[str, object] = {}
    for name, call in calls.items():
        # Products of zeros are faster than others: power is what limits them.
        in_place_CV.copy_(own_CV)
        figures[f"{name} (TFLOP/s)"] = round(flop / median_ms(call, scale) / 1e9, 1)
    return figures


def measure_kernel(scale: Scale) -> dict[str, object]:
    """GB/s of the row kernel by divergence and tiling, counting every sweep's bytes; the default tiling comes first."""
    rows, columns = scale.chunk_rows, scale.vocabulary
    padded = -(-columns // 128) * 128
    student_CP, teacher_CP = (torch.randn(rows, padded, device=scale.device) for _ in range(2))
    figures: dict[str, object] = {}
    default = kernel_rows._BLOCK, kernel_rows._WARPS
    for op, (block, warps) in itertools.product((Op.FORWARD_KL, Op.REVERSE_KL, Op.JENSEN_SHANNON), _TILINGS):
        maths = _kernel_rows(op, rows, columns, scale.device)
        launch = maths.launch(
            slice(0, rows),
            student_CP[:, :columns],
            teacher_CP[:, :columns],
            student_CP.view(torch.bfloat16)[:, :columns],
        )
        launch.constants["BLOCK"] = min(block, 1 << (columns - 1).bit_length())
        tiled = kernel_rows.Launch(
            num_rows=rows, arguments=launch.arguments, constants=launch.constants, num_warps=warps
        )
        student_CP.normal_()
        took_ms = median_ms(partial(kernel_rows._run, tiled), scale)
        sweeps = 3 if op >= Op.RENYI else 2
        gb_per_s = rows * columns * (8 * sweeps + 2) / took_ms / 1e6
        mark = ", default" if (block, warps) == default else ""
        figures[f"{op.name.lower()}, {block} columns, {warps} warps{mark}"] = {
            "ms": round(took_ms, 3),
            "gb_per_s": round(gb_per_s),
        }
    return figures


def _kernel_rows(op: Op, rows: int, columns: int, device: torch.device) -> KernelRows:
    head = OutputHead(weight_VD=torch.empty(columns, 1, device=device))
    side = StudentSide(head=head, token_weight_R=None, bias_gradient_V=None)
    mix = Mix(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
    return KernelRows(side, head, KernelForm(op=op, first=0.5), mix, None)


def measure_precision(scale: Scale) -> dict[str, object]:
    """Relative error of the hidden states' gradient against float64, near the teacher and far from it."""
    rows, vocabulary = (96, 32_000) if scale.device.type == "cuda" else (8, 300)
    figures: dict[str, object] = {}
    for distance in (1.0, 0.3, 0.1, 0.03):
        on_cpu = loss_inputs.inputs(rows, vocabulary, distance=distance)
        x = loss_inputs.Inputs(
            student_RD=_moved(on_cpu.student_RD, scale.device).requires_grad_(),
            student_VD=_moved(on_cpu.student_VD, scale.device).requires_grad_(),
            teacher_RE=_moved(on_cpu.teacher_RE, scale.device),
            teacher_VE=_moved(on_cpu.teacher_VE, scale.device),
        )
        exact_RD = loss_inputs.exact_gradient(x)
        loss = loss_inputs.fused(x)
        errors = {}
        for name, total in (("kdmesh", loss), ("formula, bfloat16 logits", _formula(x))):
            (gradient_RD,) = torch.autograd.grad(total, x.student_RD)
            errors[name] = float(f"{((gradient_RD.double() - exact_RD).norm() / exact_RD.norm()).item():.3g}")
        figures[f"kl={loss.item() / rows:.2g}"] = errors
    return figures


def measure_attention(scale: Scale) -> dict[str, object]:
    """Median milliseconds of a sequence's attention, forward and backward, at new lengths and at the same again."""
    is_tiny = scale.device.type == "cpu"
    heads, key_heads, size = (4, 2, 8) if is_tiny else (16, 8, 128)
    figures: dict[str, object] = {}
    is_allowed = torch.backends.cuda.cudnn_sdp_enabled()
    for with_cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
        first = 20 if is_tiny else 300
        _attend(first - 1, heads, key_heads, size, scale)  # loads libraries
        for name in ("new lengths", "again"):
            times = [_attend(length, heads, key_heads, size, scale) for length in range(first, first + 12)]
            forward_ms, backward_ms = (round(statistics.median(each), 3) for each in zip(*times, strict=True))
            figures[f"{'with' if with_cudnn else 'without'} cuDNN, {name}"] = {
                "forward (ms)": forward_ms,
                "backward (ms)": backward_ms,
            }
    torch.backends.cuda.enable_cudnn_sdp(is_allowed)
    return figures


def _attend(length: int, heads: int, key_heads: int, size: int, scale: Scale) -> tuple[float, float]:
    """Milliseconds on the host's clock, which is what planning takes, of forward and backward."""

    def states(count: int) -> Tensor:
        whole = torch.randn(1, count, length, size, device=scale.device).bfloat16()
        return whole.requires_grad_()

    query, key, value = states(heads), states(key_heads), states(key_heads)

    def forward() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    forward_ms, output = _host_ms(forward, scale)
    upstream = torch.randn_like(output)
    backward_ms, _ = _host_ms(lambda: torch.autograd.grad(output, (query, key, value), upstream), scale)
    return forward_ms, backward_ms


def _host_ms(call: Callable[[], T], scale: Scale) -> tuple[float, T]:
    def wait() -> None:
        if scale.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began_s = time.perf_counter()
    result = call()
    wait()
    return (time.perf_counter() - began_s) * 1e3, result


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device)


def _formula(x: loss_inputs.Inputs) -> Tensor:
    return loss_inputs.formula(x.student_RD @ x.student_VD.T, x.teacher_RE @ x.teacher_VE.T)
