"""Every divergence and method in the fused loss, beside its compiled formula and Liger's chunked loss.

The compiled formula gets logits that torch's product has made; its time is counted. What sorts the vocabulary is also
measured as rows grow. Liger's losses lie in a folder of their own, made on the first run.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import loss_formulas, loss_inputs
from benchmarks.divergences import PARAMS
from benchmarks.loss import peak_bytes, run_pass
from benchmarks.loss_inputs import Inputs, Method
from benchmarks.measure import finish, say, table
from kdmesh.losses import (
    ChunkRows,
    HybridWeights,
    LabelledRows,
    Matched,
    OutputHead,
    Workspace,
    build_divergence,
    fused_linear_by_rank,
    fused_linear_chunk_likelihood,
    fused_linear_hybrid,
)

_LIGER = "liger-kernel==0.6.4"
_MIB = 2**20
_ROWS_OF_MEMORY = {"adaptive_kl": (512, 1024, 2048), "uld": (512, 1024, 2048), "gold": (512, 2048), "alm": (512, 2048)}


def fused(name: str, *, workspace_of: Callable[[], Workspace] | None = None) -> Method:
    """Ours. Without a workspace the scratch is what the thread keeps."""
    if name in PARAMS:
        divergence = build_divergence(name, PARAMS[name])
        return partial(loss_inputs.fused, divergence=divergence, workspace_of=workspace_of)
    return partial(_across_tokenizers, name, workspace_of)


def _across_tokenizers(name: str, workspace_of: Callable[[], Workspace] | None, x: Inputs) -> Tensor:
    """Every row is a run of one token, token 0; the first half of the vocabularies is the same."""
    labels_R = torch.zeros(len(x.student_RD), dtype=torch.int64)
    student = LabelledRows(hidden_RD=x.student_RD, head=OutputHead(weight_VD=x.student_VD), labels_R=labels_R)
    teacher = LabelledRows(hidden_RD=x.teacher_RE, head=OutputHead(weight_VD=x.teacher_VE), labels_R=labels_R)
    begins_C = torch.arange(len(labels_R))
    chunks = ChunkRows(
        student_begins_C=begins_C, student_ends_C=begins_C + 1, teacher_begins_C=begins_C, teacher_ends_C=begins_C + 1
    )
    if name == "alm":
        return fused_linear_chunk_likelihood(student, teacher, chunks, tau=100.0).loss_sum
    workspace = None if workspace_of is None else workspace_of()
    if name == "uld":
        return fused_linear_by_rank(student, teacher, chunks, workspace=workspace).loss_sum
    both_M = torch.arange(len(x.student_VD) // 2)
    return fused_linear_hybrid(
        student,
        teacher,
        chunks,
        matched=Matched(student_M=both_M, teacher_M=both_M),
        weights=HybridWeights(beta=0.5, matched=0.5, unmatched=0.5),
        workspace=workspace,
    ).loss_sum


def formula(name: str) -> loss_formulas.Formula:
    """As it is written down."""
    return {**loss_formulas.DIVERGENCES, **loss_formulas.ACROSS_TOKENIZERS}[name]


def compiled(name: str) -> Method:
    """It compiles when it is first called."""
    made = torch.compile(formula(name))
    return lambda x: made(x.student_RD @ x.student_VD.T, x.teacher_RE @ x.teacher_VE.T)


def liger(folder: Path) -> Method | None:
    """Liger's chunked Jensen-Shannon loss, in chunks of 1024 rows that it compiles; None where it cannot be fetched."""
    if not (folder / "liger_kernel").is_dir():
        say(f"fetching {_LIGER} ...")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), _LIGER]
        if subprocess.run(command).returncode != 0:
            return None
    sys.path.append(str(folder))
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5
    )

    def method(x: Inputs) -> Tensor:
        labels_R = torch.zeros(len(x.student_RD), dtype=torch.int64)
        mean: Tensor = loss(x.student_RD, x.student_VD, x.teacher_RE, x.teacher_VE, labels_R)
        return mean * len(labels_R)

    return method


def disagreements(names: Sequence[str]) -> list[str]:
    """Of the fused loss and the formula, in float32 on a few rows: those that are not the same thing."""
    made = loss_inputs.inputs(24, 400)
    x = Inputs(
        student_RD=made.student_RD.detach().float().requires_grad_(),
        student_VD=made.student_VD.detach().float().requires_grad_(),
        teacher_RE=made.teacher_RE.float(),
        teacher_VE=made.teacher_VE.float(),
    )
    found = []
    for name in names:
        mine = fused(name)(x)
        theirs = formula(name)(x.student_RD @ x.student_VD.T, x.teacher_RE @ x.teacher_VE.T)
        both = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, x.leaves)]) for loss in (mine, theirs)]
        is_same = torch.isclose(mine.float(), theirs, rtol=1e-3, atol=1e-4).item()
        if not is_same or (both[0] - both[1]).norm() > 1e-2 * both[1].norm():
            found.append(f"{name}: {mine.item():.6g} and {theirs.item():.6g}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """Of one method, round by round."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def take(self, method: Method, x: Inputs) -> None:
        """One forward and backward pass."""
        began = time.perf_counter(), time.process_time()
        run_pass(method, x)
        self.wall_s.append(time.perf_counter() - began[0])
        self.cpu_s.append(time.process_time() - began[1])

    def of(self, other: _Times) -> tuple[float, float]:
        """Median over rounds of this one's time over the other's: wall, CPU."""
        return (
            statistics.median(a / b for a, b in zip(self.wall_s, other.wall_s, strict=True)),
            statistics.median(a / b for a, b in zip(self.cpu_s, other.cpu_s, strict=True)),
        )


def main() -> None:
    """Print two tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of the times")
    parser.add_argument("--liger", type=Path, default=Path(".cache/bench-liger"), help="folder of Liger's losses")
    parser.add_argument("--child", nargs=4, metavar=("WAY", "NAME", "ROWS", "VOCABULARY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        way, name, rows, vocabulary = given.child
        method = compiled(name) if way == "compiled" else fused(name, workspace_of=Workspace)
        say(str(peak_bytes(method, int(rows), int(vocabulary), dtype=loss_inputs.measured_dtype())))
        return
    names = [*PARAMS, *loss_formulas.ACROSS_TOKENIZERS]
    if wrong := disagreements(names):
        raise SystemExit("fused loss and formula are not the same: " + "; ".join(wrong))
    rows, vocabulary = (64, 1000) if given.quick else (1024, 32_000)
    dtype = loss_inputs.measured_dtype()
    say(f"T={rows}, V={vocabulary}, {dtype}, {torch.get_num_threads()} threads, forward and backward")
    x = loss_inputs.inputs(rows, vocabulary, dtype=dtype)
    times = _times(names, x, liger(given.liger), rounds=given.rounds)
    memory = {} if given.quick else _memory(vocabulary)
    finish(
        "loss_methods",
        {"rows": rows, "vocabulary": vocabulary, "dtype": str(dtype), "times": times, "peak_mib": memory},
    )


def _times(names: Sequence[str], x: Inputs, rival: Method | None, *, rounds: int) -> Mapping[str, object]:
    """Seconds of a forward and backward pass of each, method by method; its ways take turns."""
    cells, figures = [], {}
    for name in names:
        ways = {"fused": fused(name), "compiled": compiled(name)}
        if name == "jensen_shannon" and rival is not None:
            ways["liger"] = rival
        times = {way: _Times() for way in ways}
        for turn in range(rounds + 1):
            for way, method in ways.items():
                (_Times() if turn == 0 else times[way]).take(method, x)  # the first compiles
        torch.compiler.reset()
        ours = times["fused"]
        wall, cpu = ours.of(times["compiled"])
        beside = ours.of(times["liger"]) if "liger" in times else None
        figures[name] = {
            "fused_s": round(statistics.median(ours.wall_s), 3),
            "of_compiled": round(wall, 2),
            "of_compiled_cpu": round(cpu, 2),
            **({} if beside is None else {"of_liger": round(beside[0], 2), "of_liger_cpu": round(beside[1], 2)}),
        }
        seconds = [f"{statistics.median(times[way].wall_s):.3f}" for way in ("fused", "compiled")]
        others = "" if beside is None else f"{beside[0]:.2f} ({beside[1]:.2f})"
        say(f"{name}: {seconds[0]} s, {wall:.2f} of the compiled formula's")
        cells.append([name, *seconds, f"{wall:.2f} ({cpu:.2f})", others])
    table(["", "fused s", "compiled formula s", "fused of it (CPU-seconds)", "fused of Liger's (CPU-seconds)"], cells)
    return figures


def _memory(vocabulary: int) -> Mapping[str, Mapping[str, int]]:
    """Peaks above the inputs, of what sorts the vocabulary or compares runs, each in a process of its own."""
    columns = sorted({rows for each in _ROWS_OF_MEMORY.values() for rows in each})
    cells, figures = [], {}
    for name, sizes in _ROWS_OF_MEMORY.items():
        for way in ("fused", "compiled") if len(sizes) == len(columns) else ("fused",):
            peaks = {rows: _peak_in_child(way, name, rows, vocabulary) // _MIB for rows in sizes}
            figures[f"{name}, {way}"] = {str(rows): peak for rows, peak in peaks.items()}
            cells.append([name, way, *(f"{peaks[rows]} MiB" if rows in peaks else "" for rows in columns)])
    say("\npeak memory above the inputs, gradients included:")
    table(["", "", *(f"T={rows}" for rows in columns)], cells)
    return figures


def _peak_in_child(way: str, name: str, rows: int, vocabulary: int) -> int:
    command = [sys.executable, "-m", "benchmarks.loss_methods", "--child", way, name, str(rows), str(vocabulary)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
