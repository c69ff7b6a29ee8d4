"""`kdmesh plan` as people call it: what a file says changes what is planned."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.copies import copy_of_kdmesh
from tests.support.other_tokenizers import save_sentence_piece
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels
from tests.support.tiny_vision import TinyVisionModels
from tests.support.trainer_jobs import write_config


@pytest.fixture
def config(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return write_config(tmp_path, student=tiny_models.path("qwen3", seed=1), teacher="127.0.0.1:1", steps=1)


def plan(config: Path, *arguments: str, code: int = 0) -> str:
    process = copy_of_kdmesh("plan", str(config), *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    return output if code == 0 else errors


def test_what_the_file_says_of_adapters_checkpoints_and_the_teacher_is_planned_for(
    config: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    server = tmp_path / "teacher.yaml"
    engine = {"kind": "transformers", "model": str(tiny_models.path("qwen3", seed=2))}
    server.write_text(yaml.safe_dump({"engine": engine, "slab": {"slots": 4, "slot_mib": 3}}), encoding="utf-8")
    whole = json.loads(plan(config, "--json", "--serve", str(server)))
    assert whole["tokens_per_micro_batch"] == 192
    assert whole["rank_bytes"]["teacher's head"] > 0
    less = ("--set", "student.lora={rank: 4}", "--set", "student.activation_checkpointing=all")
    table = plan(config, *less, "--ranks", "1", "--device", "cpu", "--serve", str(server))
    assert table.startswith("The only rank, on cpu, at its worst moment (")
    for part in ("parameters", "AdamW", "loss", "teacher's head"):
        assert part in table
    assert "slab 12 MiB of shared memory" in table
    (in_all,) = re.findall(r"in all +([\d,]+) MiB", table)
    assert int(in_all.replace(",", "")) * 2**20 < whole["rank_peak_bytes"]
    on_host = ("--set", "parallel.offload=all", "--device", "cuda")
    assert "AdamW" in plan(config, *less, *on_host, "--serve", str(server))  # most of whose parameters have no gradient


def test_layers_that_are_compared_are_planned_for_where_the_teacher_is_known(
    config: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    server = tmp_path / "teacher.yaml"
    model = tiny_models.path("qwen3", seed=2, hidden_size=48)
    server.write_text(yaml.safe_dump({"engine": {"kind": "transformers", "model": str(model)}}), encoding="utf-8")
    layers = ("--set", "objective={name: distill, layers: {pairs: {1: 1, 2: 2}, weight: 1}}")
    known = ("--json", "--serve", str(server))
    without, compared = (json.loads(plan(config, *known, *more)) for more in ((), layers))
    maps = 2 * 32 * 48
    between = "rank_bytes_between_steps"
    assert compared[between]["AdamW"] - without[between]["AdamW"] == pytest.approx(8 * maps, rel=1e-2)
    assert "Without the heads, and the layers, of teachers" in plan(config, *layers)
    beyond = ("--set", "objective.layers.pairs={3: 1}")
    assert "names layer 3 of the student" in plan(config, *layers, *beyond, code=2)
    beyond = ("--set", "objective.layers.pairs={1: 3}", "--serve", str(server))
    assert "names layer 3 of the teacher, which has layers 1 to 2" in plan(config, *layers, *beyond, code=2)


def test_the_head_of_a_teacher_with_another_tokenizer_has_its_own_tokens(
    config: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    other, server = tmp_path / "tokenizer", tmp_path / "teacher.yaml"
    size = save_sentence_piece(other, size=2000)
    model = tiny_models.path("llama", seed=2, vocab_size=4000)
    server.write_text(yaml.safe_dump({"engine": {"kind": "transformers", "model": str(model)}}), encoding="utf-8")

    def tokens(*more: str) -> float:
        both = (
            "--set",
            f"data.teacher_tokenizer={{path: {other}}}",
            *(part for each in more for part in ("--set", each)),
        )
        told = json.loads(plan(config, "--json", "--serve", str(server), *both))
        return told["rank_bytes_between_steps"]["teacher's head"] / (4 * 32)

    shared = tokens()
    assert 50 < shared < VOCABULARY_SIZE
    by_rank = "objective={name: distill, algorithm: {name: uld}}"
    assert tokens(by_rank, "data.held_out=null") == size > 3 * VOCABULARY_SIZE
    assert tokens(by_rank) == size + shared


@pytest.mark.parametrize(("family", "part"), [("qwen2_5_vl", 0.6), ("internvl", 0.8)])
def test_a_vision_tower_that_is_frozen_is_planned_without_moments(
    config: Path, tiny_vision: TinyVisionModels, family: str, part: float
) -> None:
    student = ("--json", "--set", f"student.model={tiny_vision.path(family)}")
    trained, frozen = (plan(config, *student, "--set", f"student.freeze_vision={is_it}") for is_it in ("false", "true"))
    assert json.loads(frozen)["rank_bytes"]["AdamW"] < part * json.loads(trained)["rank_bytes"]["AdamW"]


def test_what_cannot_be_planned_for_is_said_in_a_sentence(config: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake.yaml"
    fake.write_text("engine: {kind: fake}\n", encoding="utf-8")
    assert "does not configure a teacher with a model" in plan(config, "--serve", str(fake), code=2)
    assert "steps" in plan(config, "--set", "steps=0", code=2)
    absent = tmp_path / "absent.yaml"
    absent.write_text("engine: {kind: transformers, model: models/absent}\n", encoding="utf-8")
    assert "engine.model: there is no directory models/absent" in plan(config, "--serve", str(absent), code=2)
    told = tmp_path / "other" / "config.json"
    shutil.copytree(yaml.safe_load(config.read_text())["student"]["model"], told.parent)
    told.write_text(told.read_text().replace('"qwen3"', '"qwen999"'))
    other = plan(config, "--set", f"student.model={told.parent}", code=2)
    assert "is of model type 'qwen999', which transformers" in other
    assert "student.model: there is no directory gone" in plan(config, "--set", "student.model=gone", code=2)


def test_ranks_that_cannot_share_the_students_rows_of_tokens_are_not_planned_for(
    config: Path, tiny_models: TinyModels
) -> None:
    shared = ("--set", "parallel.context=2", "--ranks", "2")
    assert "1/2 of a micro-batch" in plan(config, *shared)
    hybrid = tiny_models.path("qwen3_5_text", seed=1)
    said = plan(config, *shared, "--set", f"student.model={hybrid}", code=2)
    what = "layers that carry a state from token to token"
    assert said == f"Error: parallel.context is 2 and {hybrid} has {what}; it must be 1\n"


def test_a_model_is_planned_for_without_its_weights_and_data(
    config: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_models.path("qwen3", seed=1).iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    plan(config, "--set", f"student.model={bare}", "--set", "data.train.path=absent.jsonl")
