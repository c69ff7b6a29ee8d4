"""The loss with heads that are spread over two ranks by tokens, beside whole ones that FSDP gathers.

python -m benchmarks.vocabulary_parallel [--rounds N] [--rows R]

Each rank has its own rows and one thread. A pass is all that a step does with the head: what is gathered, forward and
backward pass, and what is reduced.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import finish, table
from benchmarks.ranks import RANKS, on_ranks, tell
from kdmesh.losses import (
    Mix,
    OutputHead,
    OwnRows,
    VocabularyShare,
    Workspace,
    forward_kl,
    fused_linear_across_ranks,
    fused_linear_divergence,
)
from kdmesh_trainer.mesh import joined

VOCABULARIES = (32_000, 151_936)
STUDENT_SIZE, TEACHER_SIZE = 512, 1024
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """Of one rank: bfloat16, but for the student's weight, of which it has a part in float32."""

    share: VocabularyShare
    student_RD: Tensor
    teacher_RE: Tensor
    labels_R: Tensor
    weight_VD: Tensor  # this rank's tokens
    teacher_VE: Tensor  # all tokens


def inputs(vocabulary: int, rows: int, *, rank: int, ranks: int) -> Inputs:
    """Random ones; both ranks have the same head."""
    generator = torch.Generator().manual_seed(0)
    share = VocabularyShare(vocabulary_size=vocabulary, padded_size=vocabulary, rank=rank, num_ranks=ranks)
    weight_VD = torch.randn(vocabulary, STUDENT_SIZE, generator=generator) / 5
    teacher_VE = (torch.randn(vocabulary, TEACHER_SIZE, generator=generator) / 7).bfloat16()
    own = torch.Generator().manual_seed(1 + rank)
    return Inputs(
        share=share,
        student_RD=torch.randn(rows, STUDENT_SIZE, generator=own).bfloat16().requires_grad_(),
        teacher_RE=torch.randn(rows, TEACHER_SIZE, generator=own).bfloat16(),
        labels_R=torch.randint(vocabulary, (rows,), generator=own),
        weight_VD=weight_VD[share.first : share.first + share.num_tokens].clone().requires_grad_(),
        teacher_VE=teacher_VE,
    )


def whole(x: Inputs, workspace: Workspace | None) -> None:
    """As FSDP: the weight is gathered in bfloat16, its gradient reduced in float32."""
    part_VD = x.weight_VD.detach().bfloat16()
    counts = [x.share.longest] * x.share.num_ranks
    weight_VD = x.share.gather(part_VD, counts).requires_grad_()
    loss = fused_linear_divergence(
        x.student_RD,
        OutputHead(weight_VD=weight_VD),
        x.teacher_RE,
        OutputHead(weight_VD=x.teacher_VE),
        divergence=forward_kl,
        labels_R=x.labels_R,
        workspace=workspace,
    ).loss_sum
    _, gradient_VD = torch.autograd.grad(loss * 0.5, (x.student_RD, weight_VD))
    x.share.add_up(gradient_VD.float(), counts)


def spread(x: Inputs, workspace: Workspace | None) -> None:
    """The rows travel, and the head does not."""
    teacher = OutputHead(weight_VD=x.teacher_VE).part(x.share.first, x.share.num_tokens)
    mix = Mix(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
    loss = fused_linear_across_ranks(
        OwnRows(student_hidden_RD=x.student_RD, teacher_hidden_RE=x.teacher_RE, labels_R=x.labels_R),
        OutputHead(weight_VD=x.weight_VD),
        teacher,
        mix,
        x.share,
        counts=[len(x.student_RD)] * x.share.num_ranks,
        workspace=workspace,
    ).loss_sum
    torch.autograd.grad(loss * 0.5, (x.student_RD, x.weight_VD))


METHODS: dict[str, Callable[[Inputs, Workspace | None], None]] = {"whole": whole, "spread": spread}


def measure(vocabulary: int, rows: int, rounds: int) -> dict[str, Any]:
    """On one rank: of each method the peak above its inputs, and medians of interleaved passes."""
    with joined("cpu", longest_wait_s=600) as mesh:
        x = inputs(vocabulary, rows, rank=mesh.rank, ranks=mesh.world_size)
        for method in METHODS.values():  # loads what code loads
            method(x, None)
        peaks = {name: _peak_bytes(lambda method=method: method(x, Workspace())) for name, method in METHODS.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
        for _ in range(rounds):
            for name, method in METHODS.items():
                dist.barrier()
                began = time.perf_counter(), time.process_time()
                method(x, None)
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        return {
            name: {
                "peak_mib": round(peaks[name] / _MIB),
                "teacher_head_mib": round(_teacher_bytes(name, vocabulary, mesh.world_size) / _MIB),
                "wall_s": round(statistics.median(wall for wall, _ in times[name]), 3),
                "cpu_s": round(statistics.median(cpu for _, cpu in times[name]), 3),
            }
            for name in METHODS
        }


def _teacher_bytes(method: str, vocabulary: int, ranks: int) -> float:
    whole_bytes = vocabulary * TEACHER_SIZE * 2
    return whole_bytes / ranks if method == "spread" else whole_bytes


def _peak_bytes(run: Callable[[], None]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _on_all_ranks(vocabulary: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the first rank found."""
    told = ["--rank-of", str(vocabulary), "--rows", str(arguments.rows), "--rounds", str(arguments.rounds)]
    return on_ranks("benchmarks.vocabulary_parallel", told)[0]


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1024, help="of each rank")
    parser.add_argument("--rank-of", type=int, metavar="VOCABULARY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        tell(measure(arguments.rank_of, arguments.rows, arguments.rounds))
    found = {vocabulary: _on_all_ranks(vocabulary, arguments) for vocabulary in VOCABULARIES}
    rows = [
        (f"{vocabulary:,}", name, each["peak_mib"], each["teacher_head_mib"], each["wall_s"], each["cpu_s"])
        for vocabulary, methods in found.items()
        for name, each in methods.items()
    ]
    table(("V", "head", "peak of a pass, MiB", "teacher's head, MiB", "wall s", "CPU s of a rank"), rows)
    figures = {f"{vocabulary}": methods for vocabulary, methods in found.items()}
    finish("vocabulary_parallel", {"ranks": RANKS, "rows_per_rank": arguments.rows, "vocabularies": figures})


if __name__ == "__main__":
    main()
