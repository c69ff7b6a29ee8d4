"""The fused loss as a whole: time against the floor, memory, and the same by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.scale import Scale, median_ms, normal, peak_gib
from benchmarks.gpu.trace import kernels_of, traced
from benchmarks.loss_inputs import formula
from kdmesh.losses import Divergence, OutputHead, build_divergence, fused_linear_divergence

_DIVERGENCES: tuple[tuple[str, dict[str, float]], ...] = (
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jensen_shannon", {"beta": 0.5}),
    ("adaptive_kl", {"tail_mass": 0.5}),
)
_REST_S = 0.1  # about what the rest of a training step leaves between two passes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """bfloat16; the student's two carry a gradient."""

    student_RD: Tensor
    student_VD: Tensor
    teacher_RE: Tensor
    teacher_VE: Tensor

    @classmethod
    def build(cls, scale: Scale, *, rows: int | None = None) -> Inputs:
        """Logits of a deviation of 3."""
        rows = rows or scale.rows
        size, teacher_size = scale.student_size, scale.teacher_size
        return cls(
            student_RD=normal(rows, size, scale, seed=1).requires_grad_(),
            student_VD=normal(scale.vocabulary, size, scale, deviation=3 / size**0.5, seed=2).requires_grad_(),
            teacher_RE=normal(rows, teacher_size, scale, seed=3),
            teacher_VE=normal(scale.vocabulary, teacher_size, scale, deviation=3 / teacher_size**0.5, seed=4),
        )


def ours(x: Inputs, divergence: Divergence, chunk_rows: int | None = None) -> Tensor:
    """[] the summed loss."""
    return fused_linear_divergence(
        x.student_RD,
        OutputHead(weight_VD=x.student_VD),
        x.teacher_RE,
        OutputHead(weight_VD=x.teacher_VE),
        divergence=divergence,
        chunk_tokens=chunk_rows,
    ).loss_sum


def run_pass(method: Callable[[Inputs], Tensor], x: Inputs) -> None:
    """Forward and backward."""
    (method(x) * 0.5).backward()  # type: ignore[no-untyped-call]
    x.student_RD.grad = x.student_VD.grad = None


def measure(scale: Scale) -> dict[str, object]:
    """Of forward and backward pass: milliseconds by divergence and chunk, GiB at two numbers of rows."""
    x = Inputs.build(scale)
    figures: dict[str, object] = {"floor_ms": round(scale.floor_ms, 2)}
    for name, params in _DIVERGENCES:
        divergence = build_divergence(name, params)
        assert callable(divergence)
        took_ms = median_ms(partial(run_pass, partial(ours, divergence=divergence), x), scale)
        figures[f"{name}_ms"] = round(took_ms, 2)
        figures[f"{name}_of_floor"] = round(took_ms / scale.floor_ms, 3)
    forward_kl = build_divergence("forward_kl")
    assert callable(forward_kl)
    events = traced(partial(run_pass, partial(ours, divergence=forward_kl), x), scale)
    figures["forward_kl_kernels (ms)"] = kernels_of(events, within="everything", times=1)
    for chunk_rows in (scale.chunk_rows // 2, scale.chunk_rows, 2 * scale.chunk_rows):
        method = partial(ours, divergence=forward_kl, chunk_rows=chunk_rows)
        figures[f"forward_kl_chunk_{chunk_rows}_ms"] = round(median_ms(partial(run_pass, method, x), scale), 2)
        rested_ms = median_ms(partial(run_pass, method, x), scale, rest_s=_REST_S)
        figures[f"forward_kl_chunk_{chunk_rows}_after_rests_ms"] = round(rested_ms, 2)
    for rows in (scale.rows, 4 * scale.rows):
        few = Inputs.build(scale, rows=rows)
        peak = peak_gib(partial(run_pass, partial(ours, divergence=forward_kl), few), scale)
        gradient_gib = few.student_RD.numel() * few.student_RD.itemsize / 2**30
        # Of backward too: the hidden gradient exists as it was computed and times the upstream factor.
        figures[f"forward_kl_peak_gib_T{rows}"] = None if peak is None else round(peak - 2 * gradient_gib, 3)
    return figures


def measure_others(scale: Scale) -> dict[str, object]:
    """Forward KL by us and by whoever is installed, in the same process: milliseconds and GiB."""
    x = Inputs.build(scale)
    figures: dict[str, object] = {}
    for name, method in _methods().items():
        if method is None:
            figures[name] = "not installed"
            continue
        took_ms = median_ms(partial(run_pass, method, x), scale)
        peak = peak_gib(partial(run_pass, method, x), scale)
        figures[name] = {"ms": round(took_ms, 2), "peak_gib": None if peak is None else round(peak, 2)}
    return figures


def _methods() -> dict[str, Callable[[Inputs], Tensor] | None]:
    forward_kl = build_divergence("forward_kl")
    assert callable(forward_kl)
    compiled = torch.compile(formula)
    return {
        "kdmesh": partial(ours, divergence=forward_kl),
        "kdflow_compiled": lambda x: compiled(x.student_RD @ x.student_VD.T, x.teacher_RE @ x.teacher_VE.T),
        "trl": _trl() if find_spec("trl") else None,
        "liger_chunked": _liger_chunked() if find_spec("liger_kernel") else None,
        "liger_fused": _liger_fused() if find_spec("liger_kernel") else None,
    }


def _trl() -> Callable[[Inputs], Tensor]:
    """The loss of TRL's DistillationTrainer, from 1.16 on."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def method(x: Inputs) -> Tensor:
        divergence_R, _ = ChunkedDivergenceFunction.apply(
            x.student_RD, x.student_VD, None, x.teacher_RE, x.teacher_VE, None, 0.0
        )
        total: Tensor = divergence_R.sum()
        return total

    return method


def _liger_chunked() -> Callable[[Inputs], Tensor]:
    """Its loss for distillation, which rounds the logits to bfloat16."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss: Any = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def method(x: Inputs) -> Tensor:
        labels_R = torch.zeros(len(x.student_RD), dtype=torch.int64, device=x.student_RD.device)
        total: Tensor = loss(x.student_RD, x.student_VD, x.teacher_RE, x.teacher_VE, labels_R)
        return total

    return method


def _liger_fused() -> Callable[[Inputs], Tensor]:
    """Its Triton kernel, which takes float32 logits."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss: Any = LigerFusedLinearJSD(jsd_beta=0.0)

    def method(x: Inputs) -> Tensor:
        total: Tensor = loss(x.student_RD, x.student_VD, x.teacher_RE, x.teacher_VE, None)
        return total

    return method
