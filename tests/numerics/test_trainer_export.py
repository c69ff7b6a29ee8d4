"""A student that was not trained is written as the model that it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kdmesh.errors import CheckpointError
from kdmesh.models.body import load_causal_lm
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.mesh import joined
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.student.model import Student
from tests.support.four_bit_experts import in_four_bits
from tests.support.full_disk import files_limited_to
from tests.support.tiny_models import (
    FAMILIES,
    HYBRID_MIXTURES,
    HYBRIDS,
    MIXTURES,
    VOCABULARY_SIZE,
    save_model,
    save_tokenizer,
)

TOKENS = torch.arange(3, 40)[None]


def exported(origin: Path, *, end_of_turn: int | None = None, dtype: torch.dtype | None = None) -> Path:
    """Directory of the student as it was loaded."""
    student = Student(load_causal_lm(origin, torch.float32, torch.device("cpu")), vocabulary_size=VOCABULARY_SIZE)
    path, tokenizer = origin.parent / "final", load_fast_tokenizer(origin)
    with joined("cpu", longest_wait_s=60) as mesh:
        HuggingFaceExporter(
            path, student, origin=origin, tokenizer=tokenizer, mesh=mesh, end_of_turn=end_of_turn, dtype=dtype
        ).export()
    return path


def model(path: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A new directory of a random model."""
    save_model(path, family, seed=1, dtype=dtype, **overrides)
    save_tokenizer(path)
    return path


def change(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Add to what the directory's files say."""
    file, weights = path / "config.json", path / "model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    save_file(load_file(weights) | tensors, weights, metadata={"format": "pt"})


def read(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(path: Path) -> Tensor:
    return read(path)(TOKENS).logits


def test_who_may_read_the_directory_may_read_what_is_in_it(tmp_path: Path) -> None:
    final = exported(model(tmp_path / "origin", "qwen2"))
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    assert final.stat().st_mode == (tmp_path / "directory").stat().st_mode
    assert {path.stat().st_mode for path in final.iterdir()} == {(tmp_path / "file").stat().st_mode}


@pytest.mark.parametrize(
    ("layers", "pattern"), [(["linear_attention", "mlp", "full_attention", "moe", "mlp"], "M-*E-"), (None, "ME*-")]
)
def test_what_engines_read_of_nemotrons_layers_is_written_and_read_back(
    tmp_path: Path, layers: list[str] | None, pattern: str
) -> None:
    told = {"layers_block_type": layers} if layers else {"layers_block_type": None, "hybrid_override_pattern": pattern}
    origin = model(tmp_path / "origin", "nemotron_h", **told)
    final = exported(origin)
    said = json.loads((final / "config.json").read_text())
    assert (said["hybrid_override_pattern"], said["num_hidden_layers"]) == (pattern, len(pattern))
    said.pop("layers_block_type")  # engines know the pattern alone
    expected = logits(final)
    assert torch.equal(expected, logits(origin))
    (final / "config.json").write_text(json.dumps(said))
    assert torch.equal(logits(final), expected)
    assert exported(final).is_dir()  # and is exported again


@pytest.mark.parametrize("has_own", [True, False])
def test_an_output_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path: Path, has_own: bool) -> None:
    origin = model(tmp_path / "origin", "qwen2", tie_word_embeddings=True)
    if has_own:
        change(origin, {}, {"lm_head.weight": torch.randn(VOCABULARY_SIZE, 32, generator=torch.manual_seed(5))})
    final = exported(origin)
    assert torch.equal(logits(final), logits(origin))
    assert ("lm_head.weight" in load_file(final / "model.safetensors")) == has_own
    assert json.loads((final / "config.json").read_text())["tie_word_embeddings"] != has_own


def test_routers_are_written_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "glm4_moe", {"n_routed_experts": 32, "num_experts_per_tok": 4})
    origin = model(tmp_path / "origin", "glm4_moe", torch.bfloat16, moe_intermediate_size=16, first_k_dense_replace=0)
    bias = "model.layers.{}.mlp.gate.e_score_correction_bias"
    biases = {bias.format(n): 3.3 + 0.01 * torch.randn(32, generator=torch.manual_seed(n)) for n in range(2)}
    change(origin, {}, biases)
    final = exported(origin)
    written = load_file(final / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in biases.items())
    assert {tensor.dtype for name, tensor in written.items() if ".gate." not in name} == {torch.bfloat16}
    assert torch.equal(logits(final), logits(origin))


# Of two layers or of one. Experts with biases are held together, as are granitemoehybrid's; nemotron_h's have no gates.
_EXPERTS = {"gpt_oss": 2 * 4, "granitemoehybrid": 2 * 2, "nemotron_h": 2 * 4}
_TOGETHER = [f"model.layers.{n}.block_sparse_moe.{part}_linear.weight" for n in (0, 1) for part in ("input", "output")]


@pytest.mark.parametrize("family", [*MIXTURES, *HYBRID_MIXTURES])
def test_experts_are_written_as_the_files_that_they_came_from_hold_them(tmp_path: Path, family: str) -> None:
    origin = model(tmp_path / "origin", family, torch.bfloat16)
    final = exported(origin)
    before, after = (load_file(path / "model.safetensors") for path in (origin, final))
    assert after.keys() == before.keys()
    assert sum(".experts." in name or name in _TOGETHER for name in after) >= _EXPERTS.get(family, 3 * 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(logits(final), logits(origin))


@pytest.mark.parametrize("family", sorted(HYBRIDS.keys() - HYBRID_MIXTURES))
def test_linear_attention_is_written_as_the_files_that_it_came_from_hold_it(tmp_path: Path, family: str) -> None:
    origin = model(tmp_path / "origin", family, torch.bfloat16)
    final = exported(origin)
    before, after = (load_file(path / "model.safetensors") for path in (origin, final))
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(logits(final), logits(origin))


def test_it_may_be_written_in_another_element_type(tmp_path: Path) -> None:
    origin = model(tmp_path / "origin", "qwen2", torch.float32)
    final = exported(origin, dtype=torch.bfloat16)
    before, after = load_file(origin / "model.safetensors"), load_file(final / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name].bfloat16()), name
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_quantized_checkpoint_is_written_as_the_plain_numbers_that_were_trained(tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128}
    origin = model(tmp_path / "origin", "qwen3", torch.bfloat16, **shape)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantized = {}
    for name, tensor in load_file(origin / "model.safetensors").items():
        if "_proj" in name:
            quantized[name] = (tensor.float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
            quantized[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in tensor.shape], 0.01)
    change(origin, {"quantization_config": quantization}, quantized)
    final = exported(origin)
    assert {tensor.dtype for tensor in load_file(final / "model.safetensors").values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    assert torch.allclose(logits(final), logits(origin), rtol=0.05, atol=0.05)


def test_experts_in_four_bits_are_written_as_the_plain_numbers_that_were_trained(tmp_path: Path) -> None:
    origin = model(tmp_path / "origin", "gpt_oss", torch.bfloat16)
    plain = in_four_bits(origin)
    final = exported(origin)
    written = load_file(final / "model.safetensors")
    assert written.keys() == plain.keys()
    assert all(torch.equal(written[name], value) for name, value in plain.items())
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    assert torch.equal(logits(final), logits(origin))


@pytest.mark.parametrize("limit_bytes", [5000, 9500], ids=["weights", "tokenizer"])
def test_a_full_disk_is_said_in_a_sentence_and_leaves_nothing(tmp_path: Path, limit_bytes: int) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 2, "tie_word_embeddings": True}
    origin = model(tmp_path / "origin", "qwen2", torch.bfloat16, **shape)
    assert (origin / "model.safetensors").stat().st_size < 9500 < (origin / "tokenizer.json").stat().st_size
    with files_limited_to(limit_bytes), pytest.raises(CheckpointError, match=r"was not written to .*/final: "):
        exported(origin)
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ({"eos_token_id": 0, "temperature": 0.7, "do_sample": True}, [0, 2]),
        ({"eos_token_id": [2, 0]}, [2, 0]),
        ({"do_sample": True}, [2]),
        (None, [5, 2]),
    ],
    ids=["a base model's", "one that knows it", "no end", "no file"],
)
def test_a_response_ends_where_the_student_has_learnt_to_end_a_turn(
    tmp_path: Path, said: dict[str, Any] | None, ends: list[int]
) -> None:
    origin = model(tmp_path / "origin", "qwen2", eos_token_id=5)
    file = origin / "generation_config.json"
    file.unlink()
    if said is not None:
        file.write_text(json.dumps(said))
    final = exported(origin, end_of_turn=2)
    assert GenerationConfig.from_pretrained(final).eos_token_id == ends
    kept = json.loads((final / "generation_config.json").read_text())
    assert said is None or kept == said | {"eos_token_id": ends}
