"""Ranks that hold a row of sequences in slices have the hidden states and the gradient of one that holds it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.context import Exchange
from kdmesh.models.context_attention import use_context_attention
from kdmesh.models.packing import PackedTokens, pack, slice_bounds, slice_of
from kdmesh_trainer.mesh import Mesh
from tests.support.sequences import random_sequences
from tests.support.tiny_models import FAMILIES, VOCABULARY_SIZE, TinyModels
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_models_context"

# 63 tokens: slices end within sequences, within a window, and beyond the row.
LENGTHS = (9, 30, 2, 17, 5)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fewer key heads": ("qwen3", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "key heads that do not divide": ("qwen2", {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}),
    "windows and soft caps": ("gemma2", {}),
    "a bias and partial angles": ("phi", {}),
    "sinks and windows": ("granite_swa", {}),
    "values narrower than keys": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "first_k_dense_replace": 2,
        },
    ),
}


def run(lm: PreTrainedModel, packed: PackedTokens, weights_TD: Tensor, **told: Any) -> tuple[Tensor, list[Tensor]]:
    """Hidden states, and the gradient of their weighted sum."""
    lm.zero_grad()
    hidden_TD = hidden_states_TD(lm, packed, **told)
    (hidden_TD * weights_TD).sum().backward()
    return hidden_TD.detach(), [parameter.grad for parameter in lm.get_decoder().parameters()]


def errors(mesh: Mesh, *, models: dict[str, str], dtype: str, exchange: Exchange) -> dict[str, list[float]]:
    """Relative errors by model, of the hidden states and of the gradient's worst tensor."""
    context = mesh.context
    assert context is not None
    found = {}
    for name, path in models.items():
        lm = load_causal_lm(Path(path), getattr(torch, dtype), torch.device("cpu"))
        packed = pack(random_sequences(LENGTHS, vocabulary_size=VOCABULARY_SIZE))
        part = slice_of(packed, place=context.place, size=context.size)
        begin, end = slice_bounds(packed.num_tokens, context.size)[context.place : context.place + 2]
        weights_TD = torch.randn(end * context.size, lm.config.hidden_size, generator=torch.Generator().manual_seed(1))
        weights_TD[packed.num_tokens :] = 0
        whole_TD, whole = run(lm, packed, weights_TD[: packed.num_tokens])
        use_context_attention(lm, exchange)
        part_TD, parts = run(lm, part, weights_TD[begin:end], packed_lengths=part.lengths, context=context)
        for gradient in parts:
            dist.all_reduce(gradient)
        expected_TD = whole_TD[begin:end]
        worst = max(float((mine - all_).norm() / all_.norm()) for mine, all_ in zip(parts, whole, strict=True))
        found[name] = [float((part_TD[: len(expected_TD)] - expected_TD).norm() / expected_TD.norm()), worst]
    return found


@pytest.mark.parametrize(
    ("exchange", "size", "dtype", "tolerance"),
    [
        ("heads", 2, "float64", 1e-10),
        ("keys", 3, "float64", 1e-10),  # of 4 heads
        pytest.param("heads", 2, "bfloat16", 0.1, marks=pytest.mark.slow),
        pytest.param("keys", 2, "bfloat16", 0.1, marks=pytest.mark.slow),
        pytest.param("heads", 4, "float64", 1e-10, marks=pytest.mark.slow),
        pytest.param("keys", 5, "float64", 1e-10, marks=pytest.mark.slow),
    ],
)
def test_slices_have_the_hidden_states_and_the_gradient_of_the_whole_row(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    exchange: Exchange,
    size: int,
    dtype: str,
    tolerance: float,
) -> None:
    monkeypatch.setitem(FAMILIES, "deepseek_v3", {})
    models = {name: str(tiny_models.path(family, **told)) for name, (family, told) in MODELS.items()}
    told = {"models": models, "dtype": dtype, "exchange": exchange}
    for found in run_ranks(f"{HERE}:errors", ranks=size, context=size, **told):
        assert found.keys() == models.keys()
        for name, worst in found.items():
            # gemma2's norms compute in float32, whatever the model does.
            assert max(worst) < max(tolerance, 1e-6 if name == "windows and soft caps" else 0), (name, worst)
