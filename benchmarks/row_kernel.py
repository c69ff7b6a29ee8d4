"""Registers and spills of the fused loss's GPU kernel, compiled for sm_90 (H100, H200); needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import finish, say, table
from kdmesh.losses import OutputHead, forward_kl
from kdmesh.losses.gpu.form import KernelForm, Op
from kdmesh.losses.gpu.rows import KernelRows, Launch
from kdmesh.losses.rows import Mix, StudentSide

_TARGET = GPUTarget("cuda", 90, 32)
_REGISTERS_PER_SM = 65536
_VOCABULARY = 151_936
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one program of the kernel takes."""

    registers: int  # of each thread
    spilled_bytes: int  # stored to memory for want of registers, of each thread
    wide_loads: int  # instructions that load 16 bytes at once
    resident_programs: int  # of an SM at a time, as far as registers allow


def launch(op: Op, *, is_full: bool) -> Launch:
    """For a chunk of 2048 rows of bfloat16 models; `is_full`: with labels, weights, temperature, cap and entropies."""
    rows, columns = 2048, _VOCABULARY
    student_CV, teacher_CV = (torch.empty(rows, columns, device="meta") for _ in range(2))
    weight_VD = torch.empty(columns, 1, device="meta")
    head = OutputHead(weight_VD=weight_VD, logit_softcap=30.0 if is_full else None)
    mix = Mix(
        divergence=forward_kl,  # the form below counts
        temperature=2.0 if is_full else 1.0,
        kd_weight=1.0,
        ce_weight=0.5 if is_full else 0.0,
        with_entropies=is_full,
        top_k=0,
    )
    needs_labels = is_full or op in (Op.NOTHING, Op.SAMPLED_REVERSE_KL)
    side = StudentSide(
        head=head,
        token_weight_R=torch.empty(rows, device="meta") if is_full else None,
        bias_gradient_V=None,
    )
    labels_R = torch.empty(rows, dtype=torch.int64, device="meta") if needs_labels else None
    form = KernelForm(op=op, first=0.5, second=0.5)
    maths = KernelRows(side, None if op is Op.NOTHING else head, form, mix, labels_R)
    return maths.launch(slice(0, rows), student_CV, teacher_CV, student_CV.view(torch.bfloat16)[:, :columns])


def resources(given: Launch) -> Resources:
    """Compile for sm_90 as a launch would, and read ptxas's report."""
    from kdmesh.losses.gpu.row_kernel import row_kernel

    arguments = {**given.arguments, **given.constants}
    source = ASTSource(
        row_kernel,
        signature={name: _type(value, name in given.constants) for name, value in arguments.items()},
        constexprs={(row_kernel.arg_names.index(name),): value for name, value in given.constants.items()},
        attrs={
            (row_kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, value in given.arguments.items()
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        },
    )
    compiled = triton.compile(source, target=_TARGET, options={"num_warps": given.num_warps})
    ptx = compiled.asm["ptx"]
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [assembler, "-v", "--gpu-name=sm_90a", "-o", Path(directory) / "kernel.cubin", path]
        report = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    registers = _number(r"Used (\d+) registers", report)
    return Resources(
        registers=registers,
        spilled_bytes=_number(r"(\d+) bytes spill stores", report),
        wide_loads=len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
        resident_programs=_REGISTERS_PER_SM // (-(-registers // 8) * 8 * 32 * given.num_warps),
    )


def _type(value: Any, is_constant: bool) -> str:
    if is_constant:
        return "constexpr"
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise SystemExit(f"ptxas reports nothing like {pattern!r}:\n{report}")
    return int(found[1])


def main() -> None:
    """Print a table and the JSON line."""
    cells: list[list[object]] = []
    figures: dict[str, dict[str, int]] = {}
    for op in Op:
        for is_full in (False, True):
            found = resources(launch(op, is_full=is_full))
            name = op.name.lower() + (", every option" if is_full else "")
            cells.append([name, found.registers, found.spilled_bytes, found.wide_loads, found.resident_programs])
            figures[name] = {"registers": found.registers, "spilled_bytes": found.spilled_bytes}
    say(f"triton {triton.__version__}, sm_90a, V={_VOCABULARY}")
    table(["kernel", "registers", "spilled bytes", "16-byte loads", "programs per SM"], cells)
    finish("row_kernel", {"triton": triton.__version__, "sm_90": figures})


if __name__ == "__main__":
    main()
