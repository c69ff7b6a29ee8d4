"""A fingerprint names weights and architecture, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdmesh.models import fingerprint
from kdmesh.models.body import load_causal_lm
from kdmesh.models.fingerprint import architecture_fingerprint, model_fingerprint, named_weights
from tests.support.tiny_models import TinyModels

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_models: TinyModels) -> PreTrainedModel:
    return load_causal_lm(tiny_models.path(), "auto", CPU)


def test_the_directory_does_not_matter(tiny_models: TinyModels, model: PreTrainedModel, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_models.path(), tmp_path / "elsewhere")
    assert model_fingerprint(load_causal_lm(Path(copy), "auto", CPU)) == model_fingerprint(model)


def test_a_model_saved_and_loaded_keeps_its_name(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load_causal_lm(tmp_path, "auto", CPU)) == model_fingerprint(model)


def test_attention_and_training_mode_do_not_matter(model: PreTrainedModel) -> None:
    before = model_fingerprint(model)
    model.train()
    model.set_attn_implementation("sdpa")
    assert model_fingerprint(model) == before


def test_other_weights_dtypes_and_architectures_have_other_names(tiny_models: TinyModels) -> None:
    models = [
        load_causal_lm(tiny_models.path(), "auto", CPU),
        load_causal_lm(tiny_models.path(), torch.bfloat16, CPU),
        load_causal_lm(tiny_models.path(seed=1), "auto", CPU),
        load_causal_lm(tiny_models.path("llama"), "auto", CPU),
        load_causal_lm(tiny_models.path(rms_norm_eps=1e-5), "auto", CPU),
    ]
    assert len({model_fingerprint(model) for model in models}) == len(models)


def test_either_end_of_any_tensor_matters(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_SAMPLED", 5)
    names = {model_fingerprint(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            for place in (0, -1):
                parameter.view(-1)[place] += 1
                names.add(model_fingerprint(model))
    assert len(names) == 1 + 2 * len(list(model.parameters()))


def test_an_architecture_has_one_name_whatever_its_weights_dtype_and_device(tiny_models: TinyModels) -> None:
    models = [
        load_causal_lm(tiny_models.path(), "auto", CPU),
        load_causal_lm(tiny_models.path(), torch.bfloat16, CPU),
        load_causal_lm(tiny_models.path(seed=1), "auto", CPU),
        load_causal_lm(tiny_models.path(eos_token_id=2), "auto", CPU),
    ]
    with torch.device("meta"):
        models.append(AutoModelForCausalLM.from_config(models[0].config))
    assert len({architecture_fingerprint(model) for model in models}) == 1


def test_other_architectures_have_other_names(tiny_models: TinyModels) -> None:
    paths = [
        tiny_models.path(),
        tiny_models.path("llama"),
        tiny_models.path(rms_norm_eps=1e-5),
        tiny_models.path(num_hidden_layers=1),
        tiny_models.path(tie_word_embeddings=True),
    ]
    assert len({architecture_fingerprint(load_causal_lm(path, "auto", CPU)) for path in paths}) == len(paths)


def test_tied_weights_are_named_once(tiny_models: TinyModels) -> None:
    untied = load_causal_lm(tiny_models.path(tie_word_embeddings=False), "auto", CPU)
    tied = load_causal_lm(tiny_models.path(tie_word_embeddings=True), "auto", CPU)
    assert named_weights(untied).keys() - named_weights(tied).keys() == {"lm_head.weight"}
    assert "model.embed_tokens.weight" in named_weights(tied)
