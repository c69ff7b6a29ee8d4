"""A whole off-policy step on one device: teacher's body, slot, student's body under FSDP2, loss, backward, AdamW.

All in one process, without servers and gRPC: a teacher of Qwen3-1.7B's shape and a student of Qwen3-0.6B's, with random
weights, which cost what others cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu.handles import register
from benchmarks.gpu.scale import Scale
from kdmesh.handles.slab.memory import create_segment
from kdmesh.losses import FusedLoss, OutputHead, build_divergence, fused_linear_divergence
from kdmesh.models.attention import PACKED_ATTENTION
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.head import output_head
from kdmesh.models.packing import PackedTokens, pack
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.student.model import Student, begin_micro_batch, shard
from kdmesh_trainer.student.shards import norm_over_ranks

_SEQUENCES = 8
_TEACHER = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
_STUDENT = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """What `build_adamw` reads of a configuration."""

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    moments: str = "float32"


@dataclass(slots=True)
class _Clock:
    """Milliseconds of the parts of a step, each ended by a wait for the device."""

    device: torch.device
    parts: dict[str, list[float]] = field(default_factory=dict)

    def run(self, name: str, call: Callable[[], Tensor | None]) -> Tensor | None:
        """Its result, timed."""
        began_s = time.perf_counter()
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.parts.setdefault(name, []).append((time.perf_counter() - began_s) * 1e3)
        return result


def build_lm(vocabulary: int, shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Qwen3 with random weights on the device."""
    heads = shape["num_attention_heads"]
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocabulary,
        num_key_value_heads=heads // 2,
        head_dim=128 if shape is not TINY else 8,
        tie_word_embeddings=False,
        **shape,
    )
    with device:
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION, dtype=dtype)
    built: PreTrainedModel = lm.to(device).eval()
    return built


def measure(scale: Scale) -> dict[str, object]:
    """Median milliseconds of each part, memory, and whether the loss fell."""
    is_tiny = scale.device.type == "cpu"
    dtype = torch.float32 if is_tiny else torch.bfloat16
    with joined("cpu" if is_tiny else "cuda", longest_wait_s=60) as mesh:
        teacher = build_lm(scale.vocabulary, TINY if is_tiny else _TEACHER, scale.device, dtype)
        return _run(scale, mesh, teacher, build_student(scale), dtype)


def build_student(scale: Scale) -> Student:
    """Not sharded yet."""
    shape = TINY if scale.device.type == "cpu" else _STUDENT
    lm = build_lm(scale.vocabulary, shape, scale.device, torch.float32)
    return Student(lm, vocabulary_size=scale.vocabulary)


def _run(scale: Scale, mesh: Mesh, teacher: PreTrainedModel, student: Student, dtype: torch.dtype) -> dict[str, object]:
    shard(student, mesh.device_mesh, compute_dtype=dtype)
    optimizer = build_adamw(student, AdamWSettings())  # type: ignore[arg-type]
    packed = packed_tokens(scale, together=scale.device.type == "cuda").to(scale.device)
    head = output_head(teacher).detached()
    segment = create_segment(packed.num_rows * head.hidden_size * dtype.itemsize)
    slot_RD = torch.frombuffer(segment.writable, dtype=dtype, count=packed.num_rows * head.hidden_size).view(
        packed.num_rows, -1
    )
    refusal = register(slot_RD.view(torch.uint8), 0) if scale.device.type == "cuda" else "there is no CUDA here"
    clock = _Clock(device=scale.device)
    losses = []
    for turn in range(scale.rounds + 2):
        losses.append(_step(clock, teacher, head, student, optimizer, packed, slot_RD))
        if turn == 1:  # the first two compile and fill caches
            clock.parts.clear()
    medians = {name: statistics.median(times) for name, times in clock.parts.items()}
    total_ms = sum(medians.values())
    return {
        "tokens": packed.num_tokens,
        "slot registered": refusal or True,
        **{f"{name} (ms)": round(took_ms, 2) for name, took_ms in medians.items()},
        "whole step (ms)": round(total_ms, 2),
        "tokens_per_s": round(packed.num_tokens / total_ms * 1e3),
        "first and last loss, nats per token": [round(loss / packed.num_rows, 5) for loss in (losses[0], losses[-1])],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if scale.device.type == "cuda" else None,
    }


def _step(
    clock: _Clock,
    teacher: PreTrainedModel,
    head: OutputHead,
    student: Student,
    optimizer: torch.optim.Optimizer,
    packed: PackedTokens,
    slot_RD: Tensor,
) -> float:
    """One step; the loss that it began with."""

    def prefill() -> Tensor:
        with torch.no_grad():
            return hidden_states_TD(teacher, packed).index_select(0, packed.rows_R)

    def row_loss(hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor) -> FusedLoss:
        divergence = build_divergence("forward_kl")
        return fused_linear_divergence(hidden_RD, student_head, rows_RE, head, divergence=divergence, labels_R=labels_R)

    def forward() -> Tensor:
        loss_sum: Tensor = student(packed, row_loss).loss_sum
        return loss_sum

    made_RE = clock.run("teacher's body", prefill)
    assert made_RE is not None
    clock.run("rows into the slot", lambda: slot_RD.copy_(made_RE, non_blocking=True))
    rows_RE = clock.run("rows from the slot", lambda: slot_RD.to(made_RE.device, non_blocking=True))
    assert rows_RE is not None
    student.train()
    begin_micro_batch(student, is_last=True)
    loss_sum = clock.run("student's body and loss", forward)
    assert loss_sum is not None
    clock.run("backward", lambda: (loss_sum / packed.num_rows).backward())  # type: ignore[func-returns-value]
    clock.run("AdamW", lambda: descend(student, optimizer))  # type: ignore[func-returns-value]
    return loss_sum.item()


def descend(student: Student, optimizer: torch.optim.Optimizer) -> None:
    """What a step does once the gradient is complete, but for reading figures."""
    parameters = list(student.parameters())
    norm = norm_over_ranks([parameter.grad for parameter in parameters if parameter.grad is not None])
    clip_grads_with_norm_(parameters, 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def packed_tokens(scale: Scale, *, together: bool = False) -> PackedTokens:
    """Sequences of one length, with every position; `together` lets one call attend to all of them."""
    random = np.random.default_rng(0)
    length = scale.rows // _SEQUENCES
    packed = pack(
        [
            TokenSequence(
                token_ids=random.integers(0, scale.vocabulary, length).astype(np.int32),
                positions=np.arange(length - 1, dtype=np.int32),
            )
            for _ in range(_SEQUENCES)
        ]
    )
    return packed.with_starts() if together else packed
