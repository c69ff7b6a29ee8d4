"""Memory, time and gradient error of the fused loss, beside the plain formula, eager and compiled."""

from __future__ import annotations

import argparse
import ctypes
import gc
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import loss_inputs
from benchmarks.loss_inputs import STUDENT_SIZE, Inputs, Method
from benchmarks.measure import finish, say, table

_MIB = 2**20
_FRESH = "fused, new workspace"  # what it needs is all taken, and given back, in the one call
_MEMORY_METHODS = (_FRESH, "compiled formula", "eager formula")
_TIME_METHODS = ("fused", _FRESH, "compiled formula", "compiled with products")
_RIVAL = "compiled formula"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is measured."""

    rows: tuple[int, int]
    vocabularies: tuple[int, ...]
    rounds: int
    error_rows: int
    limit_gib: float  # of memory above the inputs; what would need more is left out

    def why_not(self, method: str, rows: int, vocabulary: int) -> str | None:
        """The reason why this is left out; None where it is measured."""
        if method.startswith("compiled") and shutil.which("g++") is None:
            return "no C++ compiler"
        needed_gib = loss_inputs.BYTES_PER_LOGIT.get(method, 0) * rows * vocabulary / 2**30
        return f"needs {needed_gib:.0f} GiB" if needed_gib > self.limit_gib else None


def main() -> None:
    """Print three tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of the time table")
    parser.add_argument("--limit-gib", type=float, default=7.5, help="leave out what needs more above its inputs")
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "ROWS", "VOCABULARY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        method, rows, vocabulary = given.child
        say(str(peak_bytes(loss_inputs.methods()[method], int(rows), int(vocabulary))))
        return
    plan = _Plan(
        rows=(256, 1024) if given.quick else (2048, 8192),
        vocabularies=(4000,) if given.quick else (32_000, 151_936),
        rounds=2 if given.quick else given.rounds,
        error_rows=32 if given.quick else 96,
        limit_gib=given.limit_gib,
    )
    say(f"student D={STUDENT_SIZE}, teacher D={loss_inputs.TEACHER_SIZE}, bfloat16, {torch.get_num_threads()} threads")
    figures = {**_memory(plan), **_time(plan), **_gradient_error(plan)}
    finish("loss", figures)


def _memory(plan: _Plan) -> dict[str, object]:
    """Peak of a forward and backward pass above its inputs, each in a process of its own."""
    few, many = plan.rows
    peaks: dict[tuple[str, int, int], int] = {}
    cells: list[list[str]] = []
    for vocabulary in plan.vocabularies:
        for method in _MEMORY_METHODS:
            row = [f"{vocabulary}", method]
            for rows in plan.rows:
                reason = plan.why_not(method, rows, vocabulary)
                if reason is None:
                    peak = peaks[method, rows, vocabulary] = _peak_in_child(method, rows, vocabulary)
                row.append(reason or f"{peak / _MIB:.0f} MiB")
            cells.append(row)
    say("\npeak memory above the inputs, forward and backward, gradients included:")
    table(["V", "method", *(f"T={rows}" for rows in plan.rows)], cells)
    outputs_bytes = (many - few) * (STUDENT_SIZE * 2 + 4 * 4)  # hidden's gradient, and per-row values
    growth = {
        vocabulary: (peaks[_FRESH, many, vocabulary] - outputs_bytes) / peaks[_FRESH, few, vocabulary]
        for vocabulary in plan.vocabularies
    }
    for vocabulary, ratio in growth.items():
        say(f"V={vocabulary}: T={many} takes {ratio:.3f} times the memory of T={few}, less the outputs' growth")
    return {
        "peak_mib": {f"{m}, T={t}, V={v}": round(peak / _MIB) for (m, t, v), peak in peaks.items()},
        "memory_growth": {f"V={vocabulary}": round(ratio, 3) for vocabulary, ratio in growth.items()},
    }


def _peak_in_child(method: str, rows: int, vocabulary: int) -> int:
    command = [sys.executable, "-m", "benchmarks.loss", "--child", method, str(rows), str(vocabulary)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_bytes(method: Method, rows: int, vocabulary: int, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Above the inputs, of the second of two equal passes: the first loads code and compiles."""
    inputs = loss_inputs.inputs(rows, vocabulary, dtype=dtype)
    run_pass(method, inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status_bytes("VmRSS")
    run_pass(method, inputs)
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}; this benchmark needs Linux")


def run_pass(method: Method, inputs: Inputs) -> None:
    """Forward and backward."""
    (method(inputs) * 0.5).backward()  # type: ignore[no-untyped-call]
    for leaf in inputs.leaves:
        leaf.grad = None


def _time(plan: _Plan) -> dict[str, object]:
    """Seconds of a forward and backward pass; the methods take turns, so that each meets the same neighbours."""
    cells: list[list[str]] = []
    ratios: dict[str, dict[str, float]] = {}
    for vocabulary in plan.vocabularies:
        rows = plan.rows[0]
        inputs, methods = loss_inputs.inputs(rows, vocabulary), loss_inputs.methods()
        names = [name for name in _TIME_METHODS if plan.why_not(name, rows, vocabulary) is None]
        wall_s: dict[str, list[float]] = {name: [] for name in names}
        cpu_s: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(plan.rounds + 1):
            for name in names:
                began = time.perf_counter(), time.process_time()
                run_pass(methods[name], inputs)
                if turn > 0:  # the first compiles
                    wall_s[name].append(time.perf_counter() - began[0])
                    cpu_s[name].append(time.process_time() - began[1])
        rival = _RIVAL if _RIVAL in names else "fused"
        for name in names:
            wall, cpu = _ratio(wall_s[name], wall_s[rival]), _ratio(cpu_s[name], cpu_s[rival])
            ratios.setdefault(f"V={vocabulary}", {})[name] = round(wall, 3)
            seconds = f"{statistics.median(wall_s[name]):.3f}", f"{statistics.median(cpu_s[name]):.3f}"
            cells.append([f"{vocabulary}", name, *seconds, f"{wall:.2f}", f"{cpu:.2f}"])
        del inputs
    say(f"\nforward and backward at T={plan.rows[0]}, medians of {plan.rounds} interleaved rounds:")
    table(["V", "method", "seconds", "CPU-seconds", f"of {_RIVAL}", "in CPU-seconds"], cells)
    return {"time_ratio_to_compiled": ratios}


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _gradient_error(plan: _Plan) -> dict[str, object]:
    """Relative error of the hidden states' gradient against float64 on the same bfloat16 inputs."""
    methods = loss_inputs.methods()
    cells: list[list[str]] = []
    errors: dict[str, dict[str, float]] = {}
    for distance in (1.0, 0.3, 0.1, 0.03):
        inputs = loss_inputs.inputs(plan.error_rows, plan.vocabularies[0], distance=distance)
        exact_RD = loss_inputs.exact_gradient(inputs)
        with torch.no_grad():
            kl = methods["fused"](inputs).item() / plan.error_rows
        found = {}
        for name in ("fused", "eager formula"):
            (gradient_RD,) = torch.autograd.grad(methods[name](inputs), inputs.student_RD)
            found[name] = ((gradient_RD.double() - exact_RD).norm() / exact_RD.norm()).item()
        errors[f"kl={kl:.2g}"] = {name: float(f"{error:.3g}") for name, error in found.items()}
        cells.append([f"{kl:.5f}", *(f"{error:.2%}" for error in found.values())])
    say("\nrelative error of the hidden states' gradient against float64:")
    table(["mean KL in nats", "fused (float32 logits)", "formula (bfloat16 logits)"], cells)
    return {"gradient_error": errors}


if __name__ == "__main__":
    main()
