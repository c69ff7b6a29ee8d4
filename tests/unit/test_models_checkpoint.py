"""A checkpoint's files tell the same as the model made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.checkpoint import open_checkpoint
from kdmesh.models.head import output_head
from tests.support.tiny_models import TinyModels


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "granite", "phi"])
def test_the_head_is_the_loaded_models(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models.path(family)
    expected = output_head(load_causal_lm(path, torch.float32, torch.device("cpu")))
    actual = open_checkpoint(path).output_head(torch.float32)
    assert torch.equal(actual.weight_VD, expected.weight_VD)
    assert (actual.bias_V is None) == (expected.bias_V is None)
    if actual.bias_V is not None and expected.bias_V is not None:
        assert torch.equal(actual.bias_V, expected.bias_V)
    assert (actual.logit_scale, actual.logit_softcap) == (expected.logit_scale, expected.logit_softcap)


def test_the_head_of_a_checkpoint_in_several_files_is_found(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models.path("qwen3")
    model = load_causal_lm(path, torch.float32, torch.device("cpu"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    head = open_checkpoint(tmp_path).output_head(torch.bfloat16)
    assert torch.equal(head.weight_VD, output_head(model).weight_VD.bfloat16())


def test_the_fingerprint_names_weights_and_what_they_are_computed_as(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models.path("qwen3")
    one = open_checkpoint(path).fingerprint("bfloat16")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert open_checkpoint(copy).fingerprint("bfloat16") == one
    others = {
        open_checkpoint(path).fingerprint("float32"),
        open_checkpoint(path).fingerprint("bfloat16", "fp8"),
        open_checkpoint(tiny_models.path("qwen3", seed=1)).fingerprint("bfloat16"),
    }
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    others.add(open_checkpoint(copy).fingerprint("bfloat16"))
    assert len(others | {one}) == 5


def test_what_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
