"""Started as a process: trains three steps on a CPU by the trainer's parts and prints the most bytes that it took.

python -m tests.support.measured_step WARM_UP MODEL STEP

One rank of those that the environment describes. STEP is a Step as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from kdmesh.losses import (
    FusedLoss,
    Mix,
    OutputHead,
    OwnRows,
    VocabularyShare,
    forward_kl,
    fused_linear_across_ranks,
    fused_linear_divergence,
)
from kdmesh.models.body import load_causal_lm
from kdmesh.models.packing import pack
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from kdmesh_trainer.student.freezing import freeze, rest_in_bfloat16
from kdmesh_trainer.student.lora import add_adapter
from kdmesh_trainer.student.model import Student, begin_micro_batch, checkpoint_activations, shard
from kdmesh_trainer.student.rounded_modules import round_modules

TEACHER_SIZE = 64
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIX = Mix(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is trained on, and how."""

    vocabulary: int
    length: int  # of each sequence
    sequences: int  # of a micro-batch
    micro_batches: int = 1
    spreads_head: bool = False
    shard_ranks: int | None = None  # that hold one copy of the student; None: all of them
    checkpointed_every: int | None = None
    lora_rank: int | None = None
    lora_base: Literal["full", "nf4"] = "full"
    quantization: dict[str, Any] | None = None  # of a QuantizationConfig
    frozen: Sequence[str] = ()  # names of parameters
    returns_freed: bool = False  # to the kernel at once, which trainers do not do on a CPU


def train(mesh: Mesh, model: Path, step: Step, *, steps: int) -> None:
    """With random weights and tokens."""
    vocabulary, length, sequences = step.vocabulary, step.length, step.sequences
    lm = load_causal_lm(model, torch.float32, torch.device("cpu"), weights="random")
    adapter = None
    if step.lora_rank is not None:
        adapter = add_adapter(lm, LoraConfig(rank=step.lora_rank, base=step.lora_base), seed=0)
    if step.frozen:
        freeze(lm, step.frozen)
        rest_in_bfloat16(lm)
    if step.quantization is not None:
        round_modules(lm, QuantizationConfig(**step.quantization), torch.float32)
    if step.checkpointed_every is not None:
        checkpoint_activations(lm, every=step.checkpointed_every)
    student = Student(lm, vocabulary_size=vocabulary, adapter=adapter)
    head_share = VocabularyShare if step.spreads_head else None
    shard(student, mesh.device_mesh, compute_dtype=torch.float32, head_share=head_share)
    optimizer = build_adamw(student, OptimizerConfig())
    tokens = np.random.default_rng(0).integers(0, vocabulary, (sequences, length)).astype(np.int32)
    positions = np.arange(length - 1, dtype=np.int32)
    packed = pack([TokenSequence(token_ids=row, positions=positions) for row in tokens])
    num_tokens = vocabulary if student.share is None else student.share.num_tokens
    head = OutputHead(weight_VD=torch.randn(num_tokens, TEACHER_SIZE))
    rows_RE = torch.randn(packed.num_rows, TEACHER_SIZE)

    def row_loss(hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor) -> FusedLoss:
        if student.share is None:
            return fused_linear_divergence(
                hidden_RD, student_head, rows_RE, head, divergence=forward_kl, labels_R=labels_R
            )
        rows = OwnRows(student_hidden_RD=hidden_RD, teacher_hidden_RE=rows_RE, labels_R=labels_R)
        counts = [packed.num_rows] * mesh.world_size
        return fused_linear_across_ranks(rows, student_head, head, _MIX, student.share, counts=counts)

    for _ in range(steps):
        student.train()
        for n in range(step.micro_batches):
            begin_micro_batch(student, is_last=n == step.micro_batches - 1)
            (student(packed, row_loss).loss_sum / packed.num_rows).backward()
        clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    """Train, and print."""
    warm_up, model, told = sys.argv[1:]
    step = Step(**json.loads(told))
    with joined("cpu", longest_wait_s=60, shard_ranks=step.shard_ranks) as mesh:
        # Loads what code loads.
        small = replace(step, vocabulary=300, length=64, sequences=2, micro_batches=1)
        train(mesh, Path(warm_up), small, steps=1)
        gc.collect()
        if step.returns_freed:
            for parameter, value in ((_M_MMAP_THRESHOLD, 2**20), (_M_TRIM_THRESHOLD, 2**16), (_M_TOP_PAD, 0)):
                ctypes.CDLL(None).mallopt(parameter, value)
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_bytes("VmRSS")
        train(mesh, Path(model), step, steps=3)
        sys.stdout.write(f"{_status_bytes('VmHWM') - before}\n")
        sys.stdout.flush()
        if mesh.world_size > 1:
            os._exit(0)  # gloo's threads must not meet an interpreter that goes down


if __name__ == "__main__":
    main()
