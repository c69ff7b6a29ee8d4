"""A directory that is not a usable causal LM is refused with its path and the rule."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.directory import read_config
from kdmesh.models.tokenizer import load_tokenizer
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

CPU = torch.device("cpu")


@pytest.fixture
def directory(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_models.path(), tmp_path / "model"))


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def index(directory: Path, files: dict[str, str]) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


SPOILERS: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "is not a directory"),
    (lambda d: (d / "config.json").unlink(), r"no config\.json"),
    (lambda d: (d / "config.json").write_text("{"), r"cannot read .*config\.json: it is not JSON, or cut short"),
    (lambda d: (d / "config.json").write_text("[]"), "must hold an object, not list"),
    (lambda d: (d / "config.json").write_text("{}"), "model type None"),
    (lambda d: change_config(d, model_type="nonesuch"), "model type 'nonesuch'"),
    (lambda d: change_config(d, model_type="t5"), "model type 't5'"),
    (lambda d: change_config(d, model_type="nonesuch", auto_map={"AutoConfig": "x.Y"}), "runs no remote code"),
    (lambda d: change_config(d, architectures=["Qwen3ForSequenceClassification"]), "holds a Qwen3ForSequenceClass"),
    (
        lambda d: (d / "generation_config.json").write_text("{"),
        r"cannot read .*generation_config\.json: it is not JSON",
    ),
    (lambda d: (d / "generation_config.json").write_text('{"eos_token_id": ["x"]}'), "as eos_token_id, not .*x"),
    (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "other formats are not read"),
    (lambda d: index(d, {"a": "one.safetensors", "b": "two.safetensors"}), "lacks 2 weight files .*one.safetensors"),
    (lambda d: index(d, {}), "lacks 0 weight files"),
    (lambda d: os.truncate(d / "model.safetensors", 20_000), r"model\.safetensors is cut short: it has 20000 of"),
]


@pytest.mark.parametrize(("spoil", "rule"), SPOILERS)
def test_a_directory_that_is_no_model_is_refused_before_anything_loads(
    directory: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object], rule: str
) -> None:
    monkeypatch.delattr("kdmesh.models.directory.AutoConfig")
    spoil(directory)
    with pytest.raises(ConfigError, match=rule) as refusal:
        load_causal_lm(directory, "auto", CPU)
    assert str(directory) in str(refusal.value)


SPOILED_WEIGHTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: change_weights(d, lambda t: t.pop("model.norm.weight")), r"1 missing tensors.*model\.norm\.weight"),
    (lambda d: change_weights(d, lambda t: t.pop("lm_head.weight")), r"1 missing tensors.*lm_head\.weight"),
    (lambda d: change_weights(d, lambda t: t.update(extra=torch.zeros(1))), "1 unexpected tensors.*extra"),
    (lambda d: change_config(d, num_hidden_layers=1, layer_types=["full_attention"]), "unexpected tensors"),
    (
        lambda d: change_config(d, vocab_size=VOCABULARY_SIZE + 8),
        r"lm_head\.weight of shape \(320, 32\).*\(328, 32\)",
    ),
    (lambda d: change_config(d, hidden_size="wide"), r"config\.json describes no model .*hidden_size.*got str"),
    (lambda d: (d / "model.safetensors").write_bytes(b"garbage"), r"model\.safetensors is not a safetensors file"),
]


@pytest.mark.parametrize(("spoil", "rule"), SPOILED_WEIGHTS)
def test_weights_that_do_not_fit_the_architecture_are_refused(
    directory: Path, spoil: Callable[[Path], object], rule: str
) -> None:
    spoil(directory)
    with pytest.raises(ConfigError, match=f"(?s){rule}") as refusal:
        load_causal_lm(directory, "auto", CPU)
    assert str(directory) in str(refusal.value)


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"text_config": []}])
def test_a_description_that_its_family_cannot_take_is_refused_in_one_line(
    directory: Path, changes: dict[str, Any]
) -> None:
    change_config(directory, **changes)
    with pytest.raises(ConfigError, match=r"config\.json describes no model .* Fetch the file") as refusal:
        read_config(directory)
    assert str(directory) in str(refusal.value) and "\n" not in str(refusal.value)


def test_random_weights_need_no_weight_files(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert load_causal_lm(directory, torch.float32, CPU, weights="random").dtype == torch.float32


def test_sharded_weights_load(tiny_models: TinyModels, directory: Path) -> None:
    model = load_causal_lm(directory, "auto", CPU)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").is_file()
    again = load_causal_lm(directory, "auto", CPU)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_auto_keeps_the_checkpoints_dtype_and_another_converts(tiny_models: TinyModels) -> None:
    path = tiny_models.path(dtype=torch.bfloat16)
    assert load_causal_lm(path, "auto", CPU).dtype == torch.bfloat16
    assert load_causal_lm(path, torch.float32, CPU).dtype == torch.float32


def test_loading_says_nothing(tiny_models: TinyModels, capfd: pytest.CaptureFixture[str]) -> None:
    load_causal_lm(tiny_models.path(), "auto", CPU)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_is_found_beside_the_model_or_is_none(tiny_models: TinyModels) -> None:
    tokenizer = load_tokenizer(tiny_models.path())
    assert tokenizer is not None and len(tokenizer.get_vocab()) == VOCABULARY_SIZE
    assert load_tokenizer(tiny_models.path(tokenizer=False)) is None


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_a_broken_tokenizer_is_refused(directory: Path, file: str, content: str) -> None:
    (directory / file).write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(directory)
