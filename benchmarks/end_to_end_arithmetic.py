"""The bare arithmetic of the end_to_end benchmark: the same models in one process, without services."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.end_to_end_inputs import MAX_TOKENS, SEQUENCES_PER_STEP, Inputs
from kdmesh.losses import build_divergence, fused_linear_divergence
from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.head import output_head
from kdmesh.models.packing import pack
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig

_GEMM = (1024, 512, 2048)  # rows, inner, columns: about the size of the models' own


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What the machine does when nothing is in the way."""

    tokens_per_s: float
    flop_per_token: float  # of the matrix products, without attention's
    gemm_flop_per_s: float


def measure(inputs: Inputs, *, steps: int = 3) -> Arithmetic:
    """Train a few steps sequence by sequence, without padding, the fused loss on response rows only."""
    encoder = ChatEncoder(load_fast_tokenizer(inputs.student), None)
    policy = DataConfig(train=ChatFile(path=inputs.chats), max_tokens=MAX_TOKENS)
    sequences = load_sequences("train", open_dataset(policy.train), encoder, policy).sequences
    teacher = load_causal_lm(inputs.teacher, torch.float32, torch.device("cpu"))
    student = load_causal_lm(inputs.student, torch.float32, torch.device("cpu")).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    used = sequences[: SEQUENCES_PER_STEP * (steps + 1)]
    for step in range(steps + 1):  # the first warms up
        if step == 1:
            began_s = time.perf_counter()
        batch = used[step * SEQUENCES_PER_STEP : (step + 1) * SEQUENCES_PER_STEP]
        num_rows = sum(sequence.num_rows for sequence in batch)
        for sequence in batch:
            packed = pack([sequence])
            with torch.inference_mode():
                teacher_RD = hidden_states_TD(teacher, packed)[packed.rows_R]
            loss = fused_linear_divergence(
                hidden_states_TD(student, packed).index_select(0, packed.rows_R),
                output_head(student),
                teacher_RD.clone(),
                output_head(teacher),
                divergence=build_divergence("forward_kl"),
                labels_R=packed.labels_R,
            )
            (loss.loss_sum / num_rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began_s
    timed = used[SEQUENCES_PER_STEP:]
    num_tokens, num_rows = sum(s.num_tokens for s in timed), sum(s.num_rows for s in timed)
    rows_per_token = num_rows / num_tokens
    body = 2 * _body_parameters(teacher) + 6 * _body_parameters(student)
    heads = (2 * output_head(teacher).weight_VD.numel() + 6 * output_head(student).weight_VD.numel()) * rows_per_token
    return Arithmetic(
        tokens_per_s=num_tokens / seconds, flop_per_token=body + heads, gemm_flop_per_s=_gemm_flop_per_s()
    )


def _body_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.ndim == 2)


def _gemm_flop_per_s() -> float:
    rows, inner, columns = _GEMM
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    fastest_s = float("inf")
    for _ in range(50):
        began_s = time.perf_counter()
        torch.mm(left, right)
        fastest_s = min(fastest_s, time.perf_counter() - began_s)
    return 2 * rows * inner * columns / fastest_s
