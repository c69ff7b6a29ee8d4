"""A step of two ranks whose micro-batches are planned by tokens, beside micro-batches of a fixed number of sequences.

The trainer's own student, sharding, loss and plan, on two gloo ranks of this machine with one thread each. Both ways
have the same sequences in every step, none of them padded, and take turns. A fixed number is as large as memory allows:
all of a micro-batch may be of the longest length.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.measure import finish, table
from benchmarks.ranks import RANKS, on_ranks, save_student, tell
from kdmesh.batching import plan_step
from kdmesh.losses import FusedLoss, OutputHead, forward_kl, fused_linear_divergence
from kdmesh.models.body import load_causal_lm
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.model import Student, begin_micro_batch, shard

_VOCABULARY, _TEACHER_SIZE = 8000, 256
_SEQUENCES, _LONGEST, _MAX_TOKENS = 32, 1024, 4096

Plan = list[list[tuple[int, ...]]]  # of each rank, the sequences of each of its micro-batches


def by_tokens(lengths: list[int]) -> Plan:
    """As the trainer plans a step."""
    return plan_step(lengths, ranks=RANKS, max_tokens=_MAX_TOKENS)


def fixed(lengths: list[int]) -> Plan:
    """As a sampler deals them out: every rank the same number, in the order of the data."""
    size = _MAX_TOKENS // _LONGEST
    shares = [range(rank, len(lengths), RANKS) for rank in range(RANKS)]
    return [[tuple(share[first : first + size]) for first in range(0, len(share), size)] for share in shares]


def lengths_of_steps(steps: int) -> list[list[int]]:
    """Most are short, some are as long as it gets: a log-normal of median 250, cut at both ends."""
    drawn = np.random.default_rng(0).lognormal(np.log(250), 0.9, (steps, _SEQUENCES))
    return [[int(length) for length in np.clip(step, 16, _LONGEST)] for step in drawn]


def measure(mesh: Mesh, model: Path, steps: int) -> dict[str, object]:
    """Seconds of each step both ways, until both ranks are through, and this rank's micro-batches in it."""
    torch.manual_seed(0)  # the same weights on both ranks
    lm = load_causal_lm(model, torch.float32, torch.device("cpu"), weights="random")
    student = Student(lm, vocabulary_size=_VOCABULARY)
    shard(student, mesh.device_mesh, compute_dtype=torch.float32)
    optimizer = build_adamw(student, OptimizerConfig())
    head = OutputHead(weight_VD=torch.randn(_VOCABULARY, _TEACHER_SIZE))
    random = np.random.default_rng(1)

    def row_loss(hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor) -> FusedLoss:
        rows_RE = torch.randn(len(labels_R), _TEACHER_SIZE)
        return fused_linear_divergence(hidden_RD, student_head, rows_RE, head, divergence=forward_kl, labels_R=labels_R)

    def step(sequences: list[TokenSequence], plan: Plan) -> None:
        student.train()
        mine = plan[mesh.data_group]
        for n, members in enumerate(mine):
            begin_micro_batch(student, is_last=n == len(mine) - 1)
            packed = student.pack([sequences[i] for i in members])
            (student(packed, row_loss).loss_sum / _MAX_TOKENS).backward()
        clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds: dict[str, list[float]] = {"by_tokens": [], "fixed": []}
    micro_batches: dict[str, list[int]] = {"by_tokens": [], "fixed": []}
    for turn, lengths in enumerate(lengths_of_steps(steps + 1)):
        sequences = [
            TokenSequence(
                token_ids=random.integers(0, _VOCABULARY, length).astype(np.int32),
                positions=np.arange(length - 1, dtype=np.int32),
            )
            for length in lengths
        ]
        for name, planner in (("by_tokens", by_tokens), ("fixed", fixed)):
            plan = planner(lengths)
            mesh.is_any(False)  # both begin
            began_s = time.perf_counter()
            step(sequences, plan)
            mesh.is_any(False)  # both have ended it
            if turn > 0:  # the first loads code and makes moments
                seconds[name].append(time.perf_counter() - began_s)
                micro_batches[name].append(len(plan[0]))
    return {"seconds": seconds, "micro_batches": micro_batches}


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching", description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank-of", type=Path, metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        with joined("cpu", longest_wait_s=600) as mesh:
            figures = measure(mesh, arguments.rank_of, arguments.steps)
        tell(figures)
    with tempfile.TemporaryDirectory() as directory:
        save_student(Path(directory), vocabulary=_VOCABULARY)
        told = on_ranks("benchmarks.batching", ["--steps", str(arguments.steps), "--rank-of", directory])[0]
    seconds, micro_batches = told["seconds"], told["micro_batches"]
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*seconds.values(), strict=True))
    rows = [
        [name, f"{statistics.median(seconds[name]):.2f}", f"{statistics.mean(micro_batches[name]):.1f}"]
        for name in seconds
    ]
    table(["micro-batches", "median step, s", "of a rank in a step"], rows)
    figures = {
        "steps": arguments.steps,
        "ratio": round(ratio, 3),
        **{f"{name}_s": round(statistics.median(each), 3) for name, each in seconds.items()},
    }
    finish("batching", figures)


if __name__ == "__main__":
    main()
