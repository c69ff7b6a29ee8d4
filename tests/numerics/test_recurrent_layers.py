"""Mamba-2 and short convolutions compute their own recurrence, in every variant that published models have."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.decoding.decoder import Decoder, prepare_decoding
from kdmesh.models.packing import pack
from kdmesh.models.recurrent import RECURRENT_LAYERS
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.mesh import joined
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.student.model import Student
from tests.support.sequences import random_sequences
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels, save_model, save_tokenizer

CPU = torch.device("cpu")
LENGTHS = (3, 40, 17)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("granitemoehybrid", {"num_local_experts": 0}),
    ("granitemoehybrid", {"position_embedding_type": "rope"}),
    ("granitemoehybrid", {"layer_types": ["attention", "attention"]}),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"}),
    ("nemotron_h", {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}),
    ("nemotron_h", {"moe_latent_size": 12, "n_group": 2}),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "ME*-"}),
    ("falcon_h1", {"mamba_rms_norm": False, "mamba_norm_before_gate": False}),
    ("bamba", {"attn_layer_indices": None}),
    ("lfm2", {"layer_types": None, "full_attn_idxs": [1], "conv_bias": True, "tie_embedding": True}),
    ("lfm2_moe", {"use_expert_bias": False}),
    ("lfm3", {"use_sandwich_norm": False, "use_attention_gate": False}),
]
MAMBA: list[tuple[str, dict[str, Any]]] = [
    ("bamba", {}),
    ("falcon_h1", {}),
    ("falcon_h1", {"mamba_norm_before_gate": False}),
    ("falcon_h1", {"mamba_rms_norm": False}),
    ("granitemoehybrid", {}),
    ("nemotron_h", {}),
]


def sequences() -> list[Any]:
    return random_sequences(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=0)


def hugging_face(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()


@torch.no_grad()
def alone_TD(model: PreTrainedModel) -> Tensor:
    """Of each sequence by itself, by transformers."""
    decoder = model.get_decoder()
    ids = [torch.from_numpy(sequence.token_ids).long()[None] for sequence in sequences()]
    return torch.cat([decoder(input_ids=each, use_cache=False).last_hidden_state[0] for each in ids])


def distance(actual: Tensor, expected: Tensor) -> float:
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


def mixing_layer(model: PreTrainedModel) -> nn.Module:
    name = f"Packed{RECURRENT_LAYERS[model.config.model_type]}"
    return next(module for module in model.modules() if type(module).__name__ == name)


@pytest.mark.parametrize(("family", "shape"), VARIANTS)
def test_a_variant_has_transformers_hidden_states_packed_and_decoded(
    tiny_models: TinyModels, family: str, shape: dict[str, Any]
) -> None:
    path = tiny_models.path(family, **shape)
    model = load_causal_lm(path, "auto", CPU)
    expected_TD = alone_TD(hugging_face(path))
    with torch.no_grad():
        assert distance(hidden_states_TD(model, pack(sequences())), expected_TD) < 1e-5
    prepare_decoding(model)  # compares


@pytest.mark.parametrize(("family", "shape"), MAMBA)
def test_mamba_and_its_gradient_are_those_of_the_recurrence_in_float64(
    tiny_models: TinyModels, family: str, shape: dict[str, Any]
) -> None:
    layer = mixing_layer(load_causal_lm(tiny_models.path(family, **shape), "auto", CPU))
    inputs_TD = torch.randn(40, layer.hidden_size, generator=torch.manual_seed(0))
    upstream_TD = torch.randn(40, layer.hidden_size)
    mine, theirs = inputs_TD.clone().requires_grad_(), inputs_TD.double().requires_grad_()
    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters()}
    actual_TD, expected_TD = layer(mine[None])[0], recurrence_TD(layer, wide, theirs)
    assert distance(actual_TD, expected_TD) < 1e-6
    actual_TD.backward(upstream_TD)
    expected_TD.backward(upstream_TD.double())
    assert mine.grad is not None and theirs.grad is not None
    assert distance(mine.grad, theirs.grad) < 1e-5
    for name, parameter in layer.named_parameters():
        expected = wide[name].grad
        assert parameter.grad is not None and expected is not None
        assert distance(parameter.grad, expected) < 1e-5, name


def recurrence_TD(layer: Any, weights: dict[str, Tensor], inputs_TD: Tensor) -> Tensor:
    """One token after the other.

    Source: Dao and Gu 2024, arXiv:2405.21060, equation 2 with a scalar decay and the discretisation of listing 1; the
    blocks around it as in figure 6 there, and Falcon-H1's factors as in arXiv:2507.22448, section 3.2.3.
    """
    heads, size, groups, inner = layer.num_heads, layer.head_dim, layer.n_groups, layer.intermediate_size
    projected = (inputs_TD * getattr(layer, "ssm_in_multiplier", 1.0)) @ weights["in_proj.weight"].T
    projected = projected * getattr(layer, "mup_vector", torch.ones(1)).double().flatten()
    gate, mixed, step = projected.split([inner, projected.shape[1] - inner - heads, heads], dim=1)
    kernel = weights["conv1d.weight"][:, 0]
    before = torch.cat([mixed.new_zeros(kernel.shape[1] - 1, mixed.shape[1]), mixed])
    taps = sum(kernel[:, tap] * before[tap : tap + len(mixed)] for tap in range(kernel.shape[1]))
    values, keys, queries = silu(taps + weights["conv1d.bias"]).split([inner, *[(mixed.shape[1] - inner) // 2] * 2], 1)
    values = values.view(-1, heads, size)
    keys, queries = (x.view(len(x), groups, -1).repeat_interleave(heads // groups, 1) for x in (keys, queries))
    step = softplus(step + weights["dt_bias"])
    state, outputs = values.new_zeros(heads, size, keys.shape[2]), []
    for value, key, query, dt in zip(values, keys, queries, step, strict=True):
        decay = torch.exp(-weights["A_log"].exp() * dt)
        state = decay[:, None, None] * state + (dt[:, None] * value)[:, :, None] * key[:, None, :]
        outputs.append((state @ query[:, :, None])[:, :, 0] + weights["D"][:, None] * value)
    output = torch.stack(outputs).flatten(1)
    return gated(layer, weights, output, silu(gate)) @ weights["out_proj.weight"].T


def gated(layer: Any, weights: dict[str, Tensor], output: Tensor, gate: Tensor) -> Tensor:
    if "norm.weight" not in weights:
        return output * gate
    gates_first = not getattr(layer.norm, "norm_before_gate", False)
    grouped = (output * gate if gates_first else output).view(len(output), layer.n_groups, -1)
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + layer.norm.variance_epsilon)
    normed = normed.flatten(1) * weights["norm.weight"]
    return normed if gates_first else normed * gate


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe", "lfm3"])
def test_a_short_convolution_is_a_gated_sum_over_few_tokens(tiny_models: TinyModels, family: str) -> None:
    layer: Any = mixing_layer(load_causal_lm(tiny_models.path(family), "auto", CPU))
    inputs_TD = torch.randn(9, 32, generator=torch.manual_seed(0))
    with torch.no_grad():
        before, after, values = (inputs_TD.double() @ layer.in_proj.weight.double().T).chunk(3, dim=1)
        kernel, gates = layer.conv.weight.double()[:, 0], before * values
        size = kernel.shape[1]
        sums = [
            sum(kernel[:, size - 1 - back] * gates[place - back] for back in range(min(place + 1, size)))
            for place in range(9)
        ]
        expected_TD = (after * torch.stack(sums)) @ layer.out_proj.weight.double().T
        assert distance(layer(inputs_TD[None])[0], expected_TD) < 1e-6


def test_time_steps_of_nemotron_are_limited_as_its_configuration_says(tiny_models: TinyModels, tmp_path: Path) -> None:
    expected_TD = alone_TD(hugging_face(tiny_models.path("nemotron_h")))
    path = shutil.copytree(tiny_models.path("nemotron_h"), tmp_path / "model")
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | {"time_step_min": 0.2}))
    model, own = load_causal_lm(path, "auto", CPU), hugging_face(path)
    assert distance(alone_TD(own), expected_TD) > 1e-3  # transformers has 0.2 for the smallest
    with torch.no_grad():
        assert distance(hidden_states_TD(model, pack(sequences())), expected_TD) < 1e-5
    prepare_decoding(model)
    decoder, ids = Decoder(model, tokens=1), sequences()[1].token_ids
    with torch.inference_mode():
        decoded_TD = torch.stack([decoder.join([ids[:5]])[0], *(decoder.advance([int(token)])[0] for token in ids[5:])])
    assert distance(decoded_TD, expected_TD.split(LENGTHS)[1][4:]) < 1e-5


def test_time_steps_without_limits_are_refused_with_the_directory(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_models.path("bamba"), tmp_path / "model")
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | {"time_step_limit": None}))
    with pytest.raises(ConfigError, match=r"model cannot be loaded: TypeError"):
        load_causal_lm(path, "auto", CPU)


def test_a_model_whose_time_steps_are_limited_is_trained_and_not_sampled_from(tiny_models: TinyModels) -> None:
    model = load_causal_lm(tiny_models.path("bamba", time_step_limit=(0.01, 0.1)), "auto", CPU)
    with pytest.raises(ConfigError, match=r"cannot be sampled from: time steps are limited to \(0\.01, 0\.1\)"):
        prepare_decoding(model)


@pytest.mark.parametrize(("family", "shape"), MAMBA)
def test_no_kernel_reads_weights_past_an_adapter(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, family: str, shape: dict[str, Any]
) -> None:
    model = load_causal_lm(tiny_models.path(family, **shape), "auto", CPU).train()
    code = sys.modules[type(model).__module__]

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("took weights")

    monkeypatch.setattr(code, "mamba2_split_conv1d_scan_combined", fused)
    hidden_states_TD(model, pack(sequences())).sum().backward()
    assert mixing_layer(model).in_proj.training


def test_files_of_nemotron_with_an_older_prefix_are_read_and_written(tmp_path: Path) -> None:
    origin, final = tmp_path / "origin", tmp_path / "final"
    save_model(origin, "nemotron_h", seed=1, dtype=torch.bfloat16)
    save_tokenizer(origin)
    expected_TD = alone_TD(hugging_face(origin))
    own = load_file(origin / "model.safetensors")
    older = {name.replace("model.", "backbone.", 1): tensor for name, tensor in own.items()}
    save_file(older | {"mtp.layers.0.norm.weight": torch.ones(32)}, origin / "model.safetensors", {"format": "pt"})
    student = Student(load_causal_lm(origin, torch.float32, CPU), vocabulary_size=VOCABULARY_SIZE)
    with joined("cpu", longest_wait_s=60) as mesh:
        HuggingFaceExporter(final, student, origin=origin, tokenizer=load_fast_tokenizer(origin), mesh=mesh).export()
    written = load_file(final / "model.safetensors")
    assert written.keys() == older.keys()
    assert all(torch.equal(tensor, older[name]) for name, tensor in written.items())
    assert torch.equal(alone_TD(hugging_face(final)), expected_TD)
    assert json.loads((final / "config.json").read_text())["model_type"] == "nemotron_h"
