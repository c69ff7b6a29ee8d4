"""Logits rebuilt from hidden states and the head's description equal the model's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.losses.head import OutputHead
from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.head import head_spec, output_head
from kdmesh.models.packing import pack
from tests.support.sequences import random_sequences
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

CPU = torch.device("cpu")
SEQUENCES = random_sequences([3, 30, 11], vocabulary_size=VOCABULARY_SIZE)
TIED = {"qwen3": False, "llama": True, "gemma2": True, "cohere": True, "granite": False}


def own_logits_TV(path: Any) -> Tensor:
    own = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.cat([own(input_ids=torch.from_numpy(s.token_ids).long()[None]).logits[0] for s in SEQUENCES])


def rebuilt_logits_TV(model: PreTrainedModel, vocabulary_size: int) -> Tensor:
    """As a consumer makes them: from rows, the head's tensors and the numbers of its HeadSpec alone."""
    spec, head = head_spec(model, vocabulary_size), output_head(model)
    assert (head.bias_V is not None) == spec.has_bias
    received = OutputHead(
        weight_VD=head.weight_VD.detach().clone(),
        bias_V=head.bias_V.detach().clone() if head.bias_V is not None else None,
        logit_scale=spec.logit_scale,
        logit_softcap=spec.logit_softcap,
    )
    with torch.no_grad():
        return received.sliced(spec.vocabulary_size).logits(hidden_states_TD(model, pack(SEQUENCES)))


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", TIED)
def test_logits_equal_the_models_own(tiny_models: TinyModels, family: str, is_tied: bool) -> None:
    path = tiny_models.path(family, tie_word_embeddings=is_tied)
    model = load_causal_lm(path, "auto", CPU)
    assert (model.get_input_embeddings().weight is output_head(model).weight_VD) == is_tied
    assert largest_difference(rebuilt_logits_TV(model, VOCABULARY_SIZE), own_logits_TV(path)) < 1e-5


@pytest.mark.parametrize("family", TIED)
def test_bfloat16_logits_are_as_near_as_the_models_own_rounding(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models.path(family, dtype=torch.bfloat16)
    model = load_causal_lm(path, "auto", CPU)
    assert largest_difference(rebuilt_logits_TV(model, VOCABULARY_SIZE), own_logits_TV(path).float()) < 0.05


def test_a_bias_counts(tiny_models: TinyModels) -> None:
    path = tiny_models.path("phi")
    model = load_causal_lm(path, "auto", CPU)
    assert head_spec(model, VOCABULARY_SIZE).has_bias
    assert largest_difference(rebuilt_logits_TV(model, VOCABULARY_SIZE), own_logits_TV(path)) < 1e-5


def test_padding_rows_are_no_tokens(tiny_models: TinyModels) -> None:
    path = tiny_models.path(vocab_size=VOCABULARY_SIZE + 64)
    model = load_causal_lm(path, "auto", CPU)
    spec = head_spec(model, VOCABULARY_SIZE)
    assert (spec.vocabulary_size, spec.padded_vocabulary_size) == (VOCABULARY_SIZE, VOCABULARY_SIZE + 64)
    expected = own_logits_TV(path)[:, :VOCABULARY_SIZE]
    assert largest_difference(rebuilt_logits_TV(model, VOCABULARY_SIZE), expected) < 1e-5


def test_a_tokenizer_larger_than_the_head_is_refused(tiny_models: TinyModels) -> None:
    model = load_causal_lm(tiny_models.path(), "auto", CPU)
    with pytest.raises(ConfigError, match=f"{VOCABULARY_SIZE + 1} tokens.* only {VOCABULARY_SIZE} rows"):
        head_spec(model, VOCABULARY_SIZE + 1)


def test_every_constant_reaches_the_spec(tiny_models: TinyModels) -> None:
    def spec(family: str, **changes: Any) -> tuple[float, float | None]:
        made = head_spec(load_causal_lm(tiny_models.path(family, **changes), "auto", CPU), VOCABULARY_SIZE)
        return made.logit_scale, made.logit_softcap

    assert spec("qwen3") == (1.0, None)
    assert spec("cohere") == (0.25, None)
    assert spec("granite") == (0.25, None)
    assert spec("gemma2") == (1.0, 3.0)
    assert spec("gemma2", final_logit_softcapping=None) == (1.0, None)


def test_a_students_head_carries_its_gradient(tiny_models: TinyModels) -> None:
    model = load_causal_lm(tiny_models.path("gemma2"), "auto", CPU)
    head = output_head(model)
    head.logits(torch.ones(1, head.hidden_size)).sum().backward()
    assert model.get_input_embeddings().weight.grad is not None
    assert replace(head).weight_VD is model.get_output_embeddings().weight
