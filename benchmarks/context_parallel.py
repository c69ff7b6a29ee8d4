"""Step time and memory of two ranks that train on two rows of tokens: one each, or both together half of each.

A row is one long sequence or several short ones; together, ranks exchange heads or keys.

The trainer's own student, sharding, exchange and loss, on two gloo ranks of this machine with one thread each. Weights
are small, so that memory is activations. A figure is of the rank that needs more.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.measure import finish, table
from benchmarks.ranks import RANKS, on_ranks, save_student, tell
from kdmesh.losses import FusedLoss, OutputHead, forward_kl, fused_linear_divergence
from kdmesh.models.body import load_causal_lm
from kdmesh.models.context import Exchange
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.model import Student, begin_micro_batch, shard

_VOCABULARY, _TEACHER_SIZE = 4000, 256
_WAYS: dict[str, tuple[int, Exchange]] = {"alone": (1, "heads"), "heads": (2, "heads"), "keys": (2, "keys")}
_SEQUENCES = (1, 9)  # of a row
_MIB = 2**20


def main() -> int:
    """Measure all ways in turn, print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context_parallel", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of each of the two rows")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)  # what one rank is told, as JSON
    arguments = parser.parse_args()
    if arguments.rank is not None:
        with joined("cpu", longest_wait_s=600, context=arguments.rank["context"]) as mesh:
            figures = _measure(mesh, arguments.rank, arguments.tokens, arguments.steps)
        tell(figures)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        save_student(Path(directory), vocabulary=_VOCABULARY)
        found = {(count, way): _of_ranks(way, count, directory, arguments) for count in _SEQUENCES for way in _WAYS}
    rows = [
        [str(count), way, f"{one['step_s']:.2f}", f"{one['beyond_bytes'] / _MIB:,.0f}"]
        for (count, way), one in found.items()
    ]
    table(["sequences of a row", "ranks", "median step, s", "most bytes beyond those between steps, MiB"], rows)
    figures = {f"{way}_{count}": each for (count, way), each in found.items()}
    finish("context_parallel", {"tokens": arguments.tokens, "load_before": load, **figures})
    return 0


def _of_ranks(way: str, count: int, model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The larger figure of both ranks."""
    context, exchange = _WAYS[way]
    told = json.dumps({"context": context, "exchange": exchange, "sequences": count, "model": model})
    numbers = ["--tokens", str(arguments.tokens), "--steps", str(arguments.steps), "--rank", told]
    answers = on_ranks("benchmarks.context_parallel", numbers)
    return {name: max(answer[name] for answer in answers) for name in answers[0]}


def _measure(mesh: Mesh, told: dict[str, Any], tokens: int, steps: int) -> dict[str, float]:
    """Of this rank: seconds of a step, and the most bytes in one beyond those that it holds between steps."""
    torch.manual_seed(0)  # the same weights on both ranks
    student = Student(
        load_causal_lm(Path(told["model"]), torch.float32, torch.device("cpu"), weights="random"),
        vocabulary_size=_VOCABULARY,
        context=mesh.context,
        exchange=told["exchange"],
    )
    shard(student, mesh.device_mesh, compute_dtype=torch.float32)
    optimizer = build_adamw(student, OptimizerConfig())
    drawn = np.random.default_rng(0).integers(0, _VOCABULARY, (RANKS, tokens)).astype(np.int32)
    # Of lengths such that slices end within sequences.
    rows = [np.array_split(row, told["sequences"]) for row in drawn]
    packed = [
        [TokenSequence(token_ids=part, positions=np.arange(len(part) - 1, dtype=np.int32)) for part in row]
        for row in rows
    ]
    mine = packed[mesh.data_group :: mesh.num_data_groups]  # each is a micro-batch
    head = OutputHead(weight_VD=torch.randn(_VOCABULARY, _TEACHER_SIZE))

    def row_loss(hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor) -> FusedLoss:
        rows_RE = torch.randn(len(labels_R), _TEACHER_SIZE)
        return fused_linear_divergence(hidden_RD, student_head, rows_RE, head, divergence=forward_kl, labels_R=labels_R)

    def step() -> None:
        student.train()
        for n, sequences in enumerate(mine):
            begin_micro_batch(student, is_last=n == len(mine) - 1)
            (student(student.pack(sequences), row_loss).loss_sum / tokens).backward()
        clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes moments, and loads what code loads
    times = []
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    between = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most so far is what is held now
    for _ in range(steps):
        began_s = time.perf_counter()
        step()
        mesh.is_any(False)  # both have ended it
        times.append(time.perf_counter() - began_s)
    return {
        "step_s": statistics.median(times),
        "beyond_bytes": _status_bytes("VmHWM") - between,
    }


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    raise SystemExit(main())
