"""Compares a teacher server's distribution with a local Hugging Face forward of the same model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import ConfigError, ModelMismatch
from kdmesh.models.directory import check_model_directory
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import DType, ModelDescription, TokenSequence

_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    'def add(a, b):\n    """Return the sum of a and b."""\n    return',
    "Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind;",
    "1 2 4 8 16 32 64 128 256 512",
)
_DEADLINE_S = 30.0
# Differences of a log-probability that rounding explains, over all tokens of the vocabulary. A 16-bit model's own
# logits are rounded to its type; the ones rebuilt from rows are not.
_BOUND_NATS = {DType.FLOAT32: 1e-3, DType.FLOAT16: 0.05, DType.BFLOAT16: 0.4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a comparison found."""

    has_passed: bool
    max_difference_nats: float  # of a log-probability, over all positions and tokens
    bound_nats: float
    kl_nats_per_token: float  # KL(local || service), mean over positions
    num_positions: int
    model: str
    dtype: str
    door: str

    def sentence(self) -> str:
        """The verdict for a person."""
        cure = (
            ""
            if self.has_passed
            else ". The server has other weights than the local model, or computes them wrongly; "
            "its /v1/model tells what it serves"
        )
        return (
            f"{'PASS' if self.has_passed else 'FAIL'}: log-probabilities of {self.model} differ by at most "
            f"{self.max_difference_nats:.2e} nats (bound {self.bound_nats:.0e} for {self.dtype}), "
            f"mean KL {self.kl_nats_per_token:.2e} nats, over {self.num_positions} positions through door {self.door}"
            f"{cure}"
        )

    def json(self) -> str:
        """The verdict for a machine, on one line."""
        return json.dumps(asdict(self))


def read_prompts(path: Path | None) -> list[str]:
    """The lines of `path` that are not blank, or the built-in prompts. Raises ConfigError."""
    if path is None:
        return list(_PROMPTS)
    try:
        prompts = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not prompts:
        raise ConfigError(f"{path} has no prompt: one per line")
    return prompts


def compare(
    address: str,
    model: Path,
    prompts: Sequence[str],
    *,
    bound: float | None,
    door: DoorChoice,
    access: AccessConfig = OPEN_ACCESS,
) -> Verdict:
    """Ask the service for every position of every prompt, and set it against the model in directory `model`.

    Raises:
        ConfigError: `model` cannot be loaded.
        ModelMismatch: the service's tokenizer or vocabulary is another.
        RpcError: the service does not answer, or does not let us in.
    """
    transformers_logging.disable_progress_bar()
    check_model_directory(model, needs_weights=True)
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, which is needed to write the prompts as token ids")
    with TeacherPool([address], job="probe", door=door, deadline_s=_DEADLINE_S, access=access) as pool:
        description = pool.describe()
        _check_tokenizer(model, tokenizer, description)
        sequences = [_sequence(tokenizer, prompt, description) for prompt in prompts]
        served_RV = _served_log_probabilities(pool, sequences, description)
        door_used = pool.stats().door
    local_RV = _local_log_probabilities(model, sequences, description)
    difference = float((served_RV - local_RV).abs().max())
    bound = _BOUND_NATS[description.dtype] if bound is None else bound
    return Verdict(
        has_passed=difference <= bound,
        max_difference_nats=difference,
        bound_nats=bound,
        kl_nats_per_token=float((local_RV.exp() * (local_RV - served_RV)).sum(-1).mean()),
        num_positions=len(local_RV),
        model=description.name,
        dtype=description.dtype.value,
        door=door_used,
    )


def _check_tokenizer(model: Path, tokenizer: PreTrainedTokenizerBase, served: ModelDescription) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer.get_vocab())
    if fingerprint != served.tokenizer_fingerprint:
        raise ModelMismatch(
            f"the tokenizer in {model} ({fingerprint[:12]}) is not the one of {served.name} at the service "
            f"({served.tokenizer_fingerprint[:12] or 'none'})"
        )


def _sequence(tokenizer: PreTrainedTokenizerBase, prompt: str, served: ModelDescription) -> TokenSequence:
    ids = tokenizer(prompt, add_special_tokens=True)["input_ids"][: served.max_sequence_tokens]
    if len(ids) < 2:
        raise ConfigError(f"the prompt {prompt!r} has {len(ids)} token; at least 2 are needed")
    return TokenSequence(token_ids=np.array(ids, dtype=np.int32), positions=np.arange(len(ids) - 1, dtype=np.int32))


def _served_log_probabilities(
    pool: TeacherPool, sequences: Sequence[TokenSequence], served: ModelDescription
) -> torch.Tensor:
    """[R, V] float64, from the rows and head of the service; the rows are let go of, so that their slot is free."""
    head, _ = pool.head()
    rows_RD = pool.submit(sequences).wait().rows_RD
    return head.sliced(served.head.vocabulary_size).logits(rows_RD).double().log_softmax(-1)


@torch.no_grad()
def _local_log_probabilities(path: Path, sequences: Sequence[TokenSequence], served: ModelDescription) -> torch.Tensor:
    """[R, V] float64, from the model's own forward and its own lm_head, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, served.dtype.value), local_files_only=True)
    model.eval()
    parts = []
    for sequence in sequences:
        logits_TV = model(torch.from_numpy(sequence.token_ids).long()[None]).logits[0]
        parts.append(logits_TV[:-1, : served.head.vocabulary_size].double().log_softmax(-1))
    return torch.cat(parts)
