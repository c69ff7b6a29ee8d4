"""Hidden states over packed rows are Hugging Face's own, sequence by sequence."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models import body, verify
from kdmesh.models.attention import PACKED_ATTENTION, packed_attention
from kdmesh.models.attention_sinks import WITH_SINKS
from kdmesh.models.body import empty_causal_lm, hidden_states_TD, load_causal_lm
from kdmesh.models.packing import pack
from kdmesh.types import TokenSequence
from tests.support.relative_error import relative_error
from tests.support.sequences import random_sequences
from tests.support.tiny_models import FAMILIES, HYBRID_MIXTURES, HYBRIDS, MIXTURES, VOCABULARY_SIZE, TinyModels

CPU = torch.device("cpu")
LENGTHS = (3, 40, 17, 40, 2)


def sequences(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[TokenSequence]:
    return random_sequences(lengths, vocabulary_size=VOCABULARY_SIZE, seed=seed)


def hugging_face(path: Path, attention: str, **more: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation=attention, **more).eval()


def last_hidden_states_TD(model: PreTrainedModel, sequence: TokenSequence) -> Tensor:
    """What transformers itself reports, with nothing of ours in the way."""
    ids = torch.from_numpy(sequence.token_ids).long()[None]
    return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_rows_equal_hugging_face_within_1e_5(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models.path(family)
    model, own = load_causal_lm(path, "auto", CPU), hugging_face(path, "eager")
    with torch.no_grad():
        together = hidden_states_TD(model, pack(sequences())).split(LENGTHS)
        for sequence, rows_TD in zip(sequences(), together, strict=True):
            alone_TD = hidden_states_TD(model, pack([sequence]))
            expected_TD = last_hidden_states_TD(own, sequence)
            for actual, expected in zip(rows_TD, expected_TD, strict=True):
                assert relative_error(actual, expected) < 1e-5
            assert relative_error(alone_TD, expected_TD) < 1e-5


# Of sinks transformers has its eager attention alone, which rounds otherwise: test_models_sinks.py.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - WITH_SINKS))
def test_bfloat16_rows_equal_hugging_face_within_one_rounding(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models.path(family, dtype=torch.bfloat16)
    # Their SDPA has no soft cap; their eager attention rounds otherwise than any SDPA.
    own = hugging_face(path, "eager" if family == "gemma2" else "sdpa")
    model = load_causal_lm(path, "auto", CPU)
    with torch.no_grad():
        actual_TD = hidden_states_TD(model, pack(sequences()))
        expected_TD = torch.cat([last_hidden_states_TD(own, sequence) for sequence in sequences()])
    assert actual_TD.dtype == torch.bfloat16
    assert relative_error(actual_TD, expected_TD) < 2**-8


# Two float32 passes may round the decay of a recurrence apart by more than 1e-5, each as far from float64 as the other.
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "qwen3_moe", "deepseek_v3", *HYBRIDS])
def test_gradients_are_as_near_to_float64_as_those_of_hugging_face(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models.path(family)
    model, own = load_causal_lm(path, "auto", CPU), hugging_face(path, "eager")
    exact = hugging_face(path, "eager", experts_implementation="eager").double()
    torch.manual_seed(0)
    upstream_TD = torch.randn(sum(LENGTHS), model.config.hidden_size)
    hidden_states_TD(model, pack(sequences())).backward(upstream_TD)
    for sequence, upstream in zip(sequences(), upstream_TD.split(LENGTHS), strict=True):
        last_hidden_states_TD(own, sequence).backward(upstream)
        last_hidden_states_TD(exact, sequence).backward(upstream.double())
    reached = 0
    three = zip(model.named_parameters(), own.parameters(), exact.parameters(), strict=True)
    for (name, mine), theirs, true in three:
        assert (mine.grad is None) == (theirs.grad is None) == (true.grad is None), name
        if mine.grad is not None and theirs.grad is not None and true.grad is not None:
            rounding = relative_error(theirs.grad, true.grad)
            assert rounding < 1e-4, name
            assert relative_error(mine.grad, true.grad) < 1e-5 + rounding, name
            reached += 1
    assert reached > 10


# In a mixture neighbours decide how many tokens an expert multiplies at once, and so how it rounds.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {**MIXTURES, **HYBRID_MIXTURES}))
def test_a_neighbour_changes_no_bit(tiny_models: TinyModels, family: str) -> None:
    model = load_causal_lm(tiny_models.path(family), "auto", CPU)
    mine, *others = sequences()
    with torch.no_grad():
        one = hidden_states_TD(model, pack([*others, mine]))[-mine.num_tokens :]
        two = hidden_states_TD(model, pack([*sequences(seed=1)[1:], mine]))[-mine.num_tokens :]
    assert torch.equal(one, two)


def test_inference_mode_gives_the_same_bits_and_training_works_afterwards(tiny_models: TinyModels) -> None:
    model = load_causal_lm(tiny_models.path("gemma3_text"), "auto", CPU)
    packed = pack(sequences())
    with torch.inference_mode():
        inferred_TD = hidden_states_TD(model, packed)
    trained_TD = hidden_states_TD(model, packed)
    trained_TD.sum().backward()
    assert torch.equal(inferred_TD, trained_TD.detach())


class LargestResult(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3_text", "gemma2"])
def test_neither_a_square_mask_nor_logits_are_made(tiny_models: TinyModels, family: str) -> None:
    model = load_causal_lm(tiny_models.path(family), "auto", CPU)
    packed = pack(sequences(lengths=(30,) * 20))
    largest = LargestResult()
    with torch.no_grad(), largest:
        hidden_states_TD(model, packed)
    assert largest.elements < packed.num_tokens * VOCABULARY_SIZE
    assert largest.elements < packed.num_tokens**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_follow_the_callers_seed(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    path = tiny_models.path()

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = load_causal_lm(path, dtype, CPU, weights="random")
        assert model.dtype == dtype and not model.training
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_loading_leaves_torchs_random_state_alone(tiny_models: TinyModels) -> None:
    path = tiny_models.path()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_causal_lm(path, "auto", CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def attention_that_forgets_lengths() -> Iterator[None]:
    def forgetful(module: nn.Module, query: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return packed_attention(module, query, *rest, **{**kwargs, "packed_lengths": (query.shape[2],)})

    AttentionInterface.register(PACKED_ATTENTION, forgetful)
    yield
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


@pytest.mark.usefixtures("attention_that_forgets_lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_sequences_see_each_other_is_refused(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"model type qwen3 .* apart"):
        load_causal_lm(tiny_models.path(), dtype, CPU)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_state_that_goes_on_into_the_next_sequence_is_refused(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(body, "begin_with_every_sequence", lambda model: None)
    with pytest.raises(ConfigError, match=f"model type {family} .* apart"):
        load_causal_lm(tiny_models.path(family), "auto", CPU)


def test_a_copy_of_a_hybrid_model_keeps_sequences_apart_with_its_own_weights(tiny_models: TinyModels) -> None:
    model = load_causal_lm(tiny_models.path("qwen3_5_text"), "auto", CPU)
    other = load_causal_lm(tiny_models.path("qwen3_5_text", seed=1), "auto", CPU)
    copied = copy.deepcopy(model)
    copied.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(hidden_states_TD(copied, pack(sequences())), hidden_states_TD(other, pack(sequences())))
        assert not torch.equal(hidden_states_TD(model, pack(sequences())), hidden_states_TD(other, pack(sequences())))


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "apart"),  # ignores our attention
        ("rwkv", {}, "apart"),  # a recurrent state
        ("stablelm", {}, "packed_lengths"),  # passes nothing on to its attention
        ("mamba", {}, "linear_attention"),
        ("hy_v4", {}, "indexed_attention"),
        ("deepseek_v4", {}, "heavily_compressed_attention"),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 64}, "chunked_attention"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "code does not run with packed attention .Attr"),
        (
            "modernbert-decoder",
            {"pad_token_id": 0, "bos_token_id": 1},
            "does not run with packed attention .TypeError",
        ),
        # Masks alone know the window, of which packed attention has none.
        ("phimoe", {"num_local_experts": 4, "sliding_window": 16}, "windows of 3 tokens in place of 16, .* apart"),
    ],
)
def test_an_unsupported_architecture_is_refused_by_name(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, family: str, config: dict[str, int], reason: str
) -> None:
    monkeypatch.setitem(FAMILIES, family, config)
    with pytest.raises(ConfigError, match=f"model type {family} of .*{reason}"):
        load_causal_lm(tiny_models.path(family, tokenizer=False), "auto", CPU)


def test_layers_of_a_kind_that_is_not_known_are_refused_before_weights_are_read(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(FAMILIES, "mamba", {})
    shutil.copytree(tiny_models.path("mamba", tokenizer=False), tmp_path, dirs_exist_ok=True)
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})  # whole, and without any tensor
    for load in (lambda path: load_causal_lm(path, "auto", CPU), empty_causal_lm):
        with pytest.raises(ConfigError, match=r"mamba of .*: it has layers of type .'linear_attention'"):
            load(tmp_path)


def test_weights_that_are_not_finite_are_refused_as_such(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = hugging_face(tiny_models.path(), "sdpa")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="computes what is not finite; look at its weights"):
        load_causal_lm(tmp_path, "auto", CPU)


def test_a_model_that_takes_no_other_attention_is_refused(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]})
    with pytest.raises(ConfigError, match=r"gpt_neo.* cannot be loaded: its model type knows its own attentions alone"):
        load_causal_lm(tiny_models.path("gpt_neo", tokenizer=False), "auto", CPU)


@pytest.mark.parametrize("window", [None, 256])
def test_a_window_that_no_sequence_is_longer_than_does_not_matter(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setitem(FAMILIES, "phimoe", {"num_local_experts": 4})
    model = load_causal_lm(tiny_models.path("phimoe", sliding_window=window, tokenizer=False), "auto", CPU)
    assert model.config.sliding_window == window


def test_loading_leaves_windows_as_they_are(tiny_models: TinyModels) -> None:
    model = load_causal_lm(tiny_models.path("gemma3_text"), "auto", CPU)
    assert model.config.sliding_window == 8
    assert {vars(module).get("sliding_window") for module in model.modules()} - {None} == {8}


def test_a_model_whose_attention_drops_out_in_training_is_refused_with_the_key(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", {})
    model = load_causal_lm(tiny_models.path("gpt2"), "auto", CPU)
    with pytest.raises(ConfigError, match=r"cannot be trained: .* dropout 0\.1: .* \(attn_pdrop in config\.json\)$"):
        verify.check_training(model)
    assert not model.training
    model = load_causal_lm(tiny_models.path("gpt2", attn_pdrop=0.0), "auto", CPU)
    before = torch.get_rng_state()
    verify.check_training(model)
    assert torch.equal(torch.get_rng_state(), before) and not model.training


def test_a_head_that_is_not_understood_is_refused(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    understood = verify.output_head
    monkeypatch.setattr(verify, "output_head", lambda model: replace(understood(model), logit_scale=1.0))
    with pytest.raises(ConfigError, match=r"model type granite .* logits"):
        load_causal_lm(tiny_models.path("granite"), "auto", CPU)
