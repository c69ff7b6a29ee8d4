"""Models with attention sinks are what transformers' own eager attention makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.granite_swa.modeling_granite_swa import eager_attention_forward as granite_attention

from kdmesh.models import attention
from kdmesh.models.attention import packed_attention
from kdmesh.models.attention_sinks import WITH_SINKS
from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.decoding.decoder import prepare_decoding
from kdmesh.models.packing import pack
from tests.support.four_bit_experts import in_four_bits
from tests.support.relative_error import relative_error
from tests.support.sequences import random_sequences
from tests.support.tiny_models import FAMILIES, VOCABULARY_SIZE, TinyModels

HEADS, KEY_HEADS, DIM = 6, 2, 16
LENGTHS = (3, 40, 17, 40, 2)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def states(dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (1, HEADS, sum(LENGTHS), DIM), *2 * ((1, KEY_HEADS, sum(LENGTHS), DIM),), (HEADS,)
    return tuple((1.5 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes)


def own(attend: Callable[..., Any], inputs: tuple[Tensor, ...], window: int | None) -> Tensor:
    """[1, T, heads, dim] by transformers' function, one sequence after the other, under a mask as it makes them."""
    layer = nn.Identity()
    layer.num_key_value_groups = HEADS // KEY_HEADS  # type: ignore[assignment]
    layer.sinks = inputs[3]  # type: ignore[assignment]
    outputs = []
    for query, key, value in zip(*(part.split(LENGTHS, dim=2) for part in inputs[:3]), strict=True):
        ones = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool)
        visible = ones.tril() if window is None else ones.tril().triu(1 - window)
        mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
        outputs.append(attend(layer, query, key, value, mask[None, None], scaling=0.3)[0])
    return torch.cat(outputs, dim=1)


def packed(inputs: tuple[Tensor, ...], window: int | None) -> Tensor:
    told = {"scaling": 0.3, "s_aux": inputs[3], "sliding_window": window, "packed_lengths": LENGTHS}
    return packed_attention(nn.Identity(), *inputs[:3], None, **told)[0]


# Granite's own rounds the softmax and what the sinks leave to float32.
@pytest.mark.parametrize(("attend", "tolerance"), [(gpt_oss_attention, 1e-10), (granite_attention, 1e-6)])
@pytest.mark.parametrize("window", [None, 8])
def test_outputs_and_gradients_in_float64_are_those_of_transformers_eager_attention(
    attend: Callable[..., Any], tolerance: float, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 16)
    inputs = states(torch.float64)
    expected, actual = own(attend, inputs, window), packed(inputs, window)
    upstream = torch.randn_like(expected)
    both = (torch.autograd.grad(outputs, inputs, upstream) for outputs in (actual, expected))
    for mine, theirs in zip([actual, *next(both)], [expected, *next(both)], strict=True):
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize("attend", [gpt_oss_attention, granite_attention])
@pytest.mark.parametrize("window", [None, 8])
def test_bfloat16_is_closer_to_float64_than_transformers_eager_attention_is(
    attend: Callable[..., Any], window: int | None
) -> None:
    inputs = states(torch.bfloat16)
    exact = tuple(part.detach().double().requires_grad_() for part in inputs)
    results = [own(gpt_oss_attention, exact, window), own(attend, inputs, window), packed(inputs, window)]
    upstream = torch.randn_like(inputs[0]).transpose(1, 2)
    told = [(exact, upstream.double()), (inputs, upstream), (inputs, upstream)]
    parts = [[r, *torch.autograd.grad(r, *given)] for r, given in zip(results, told, strict=True)]
    errors = [[relative_error(each, best) for each in others] for best, *others in zip(*parts, strict=True)]
    *of_states, of_sinks = errors
    assert all(mine < theirs for theirs, mine in of_states)
    assert max(of_sinks) < 0.015  # six numbers: chance decides which is closer


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("gpt_oss", {}),
        ("granite_swa", {}),
        ("mimo_v2_flash", {}),
        ("mimo_v2_flash", {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2}),
        ("granitemoe_swa", EXPERTS),
        ("flint", {}),
    ],
)
def test_every_model_type_with_sinks_has_the_hidden_states_and_the_gradient_of_its_own(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, family: str, told: dict[str, Any]
) -> None:
    assert family in WITH_SINKS
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES["granite_swa"], **FAMILIES.get(family, {})})
    path = tiny_models.path(family, tokenizer=False, **told)
    model = load_causal_lm(path, "auto", torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
    sequences = random_sequences(LENGTHS, vocabulary_size=VOCABULARY_SIZE)
    weights_TD = torch.randn(sum(LENGTHS), model.config.hidden_size, generator=torch.manual_seed(0))
    packed_TD = hidden_states_TD(model, pack(sequences))
    ids = [torch.from_numpy(sequence.token_ids).long()[None] for sequence in sequences]
    alone_TD = torch.cat([theirs.get_decoder()(input_ids=each).last_hidden_state[0] for each in ids])
    for hidden_TD in (packed_TD, alone_TD):
        (hidden_TD * weights_TD).sum().backward()
    reached = {}
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            reached[name] = relative_error(mine.grad, other.grad)
    assert relative_error(packed_TD, alone_TD) < 1e-5
    assert max(reached.values()) < 1e-5
    assert any(name.endswith(".sinks") for name in reached)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_experts_in_four_bits_are_plain_numbers_when_they_are_loaded(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: Any
) -> None:
    path = shutil.copytree(tiny_models.path("gpt_oss", dtype=torch.bfloat16), tmp_path / "model")
    plain = in_four_bits(path)
    # Nothing that keeps them in four bits is asked for.
    monkeypatch.setattr("transformers.quantizers.quantizer_mxfp4.is_accelerate_available", lambda: False)
    model = load_causal_lm(path, dtype, torch.device("cpu"))
    weights = model.state_dict()
    assert weights.keys() == plain.keys()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16 if dtype == "auto" else dtype}
    assert all(torch.equal(weights[name].to(value.dtype), value) for name, value in plain.items())


@pytest.mark.parametrize("seed", range(4))
def test_in_bfloat16_no_mixture_is_refused_because_rounding_chose_another_expert(
    tiny_models: TinyModels, seed: int
) -> None:
    """One of these would be: some tokens take other experts than under transformers' own attention."""
    path = tiny_models.path("gpt_oss", seed=seed, dtype=torch.bfloat16, tokenizer=False)
    model = load_causal_lm(path, "auto", torch.device("cpu"))
    prepare_decoding(model)
    assert [layer.mlp.router.top_k for layer in model.model.layers] == [2, 2]


def test_a_model_whose_sinks_differ_computes_otherwise(tiny_models: TinyModels) -> None:
    path = tiny_models.path("gpt_oss")
    model = load_causal_lm(path, "auto", torch.device("cpu"))
    tokens = pack(random_sequences(LENGTHS, vocabulary_size=VOCABULARY_SIZE))
    with torch.no_grad():
        before_TD = hidden_states_TD(model, tokens)
        for layer in model.model.layers:
            layer.self_attn.sinks += 1.0
        after_TD = hidden_states_TD(model, tokens)
    assert float((after_TD - before_TD).norm() / before_TD.norm()) > 0.01
