"""Time and memory of every divergence in the fused loss, beside forward KL."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import loss_inputs
from benchmarks.loss import peak_bytes, run_pass
from benchmarks.measure import finish, say, table
from kdmesh.losses import Divergence, SampledDivergence, Workspace, build_divergence, truncated

_MIB = 2**20
PARAMS: Mapping[str, Mapping[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {"beta": 0.5},
    "skewed_kl": {"skew": 0.1},
    "skewed_reverse_kl": {"skew": 0.1},
    "total_variation": {},
    "renyi": {"order": 2.0},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "adaptive_kl": {"tail_mass": 0.5},
    "masked_reverse_kl": {},
    "entropy_gated_kl": {"threshold": 0.8, "forward_weight": 1.0},
    "top1_cross_entropy": {},
    "hierarchical_ranking": {"top_k": 5},
    "sampled_reverse_kl": {},
}
_TRUNCATED: Mapping[str, Mapping[str, Any]] = {
    "forward_kl, top_k 32": {"top_k": 32},
    "forward_kl, top_p 0.95": {"top_p": 0.95},
}


def main() -> None:
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of the times")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "ROWS", "VOCABULARY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, rows, vocabulary = given.child
        method = partial(loss_inputs.fused, divergence=_divergence(name), workspace_of=Workspace)
        say(str(peak_bytes(method, int(rows), int(vocabulary), dtype=loss_inputs.measured_dtype())))
        return
    vocabulary, few, many = (2000, 128, 512) if given.quick else (32_000, 2048, 8192)
    names = [*PARAMS, *_TRUNCATED]
    seconds = _seconds(names, few, vocabulary, rounds=1 if given.quick else given.rounds)
    cells, figures = [], {}
    for name in names:
        ratio = statistics.median(own / first for own, first in zip(seconds[name], seconds["forward_kl"], strict=True))
        peaks = [_peak_in_child(name, rows, vocabulary) for rows in (few, many)]
        outputs_bytes = (many - few) * (loss_inputs.STUDENT_SIZE * loss_inputs.measured_dtype().itemsize + 4 * 4)
        growth = (peaks[1] - outputs_bytes) / peaks[0]
        figures[name] = {"time": round(ratio, 2), "peak_mib": round(peaks[0] / _MIB), "growth": round(growth, 3)}
        cells.append([name, f"{ratio:.2f}", f"{peaks[0] / _MIB:.0f} MiB", f"{growth:.3f}"])
    say(f"V={vocabulary}, {loss_inputs.measured_dtype()}, T={few}; growth of the peak to T={many} less the outputs':")
    table(["divergence", "time of forward_kl's", "peak above the inputs", "growth"], cells)
    finish("divergences", {"dtype": str(loss_inputs.measured_dtype()), "divergences": figures})


def _divergence(name: str) -> Divergence | SampledDivergence:
    base, _, _ = name.partition(",")
    divergence = build_divergence(base, PARAMS[base])
    if name not in _TRUNCATED:
        return divergence
    assert not isinstance(divergence, SampledDivergence)
    return truncated(divergence, **_TRUNCATED[name])


def _seconds(names: list[str], rows: int, vocabulary: int, *, rounds: int) -> dict[str, list[float]]:
    """Of a forward and backward pass; they take turns, so that each meets the same neighbours."""
    inputs = loss_inputs.inputs(rows, vocabulary, dtype=loss_inputs.measured_dtype())
    methods = {name: partial(loss_inputs.fused, divergence=_divergence(name)) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            began = time.perf_counter()
            run_pass(methods[name], inputs)
            if turn > 0:  # the first loads code
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _peak_in_child(name: str, rows: int, vocabulary: int) -> int:
    command = [sys.executable, "-m", "benchmarks.divergences", "--child", name, str(rows), str(vocabulary)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
