"""A model's directory is looked at without loading any of it."""

from __future__ import annotations

import json
from pathlib import Path

from kdmesh.preflight.model_files import model_problems


def test_a_weight_file_that_is_cut_short_is_told_with_its_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    table = json.dumps({"a": {"shape": [1], "data_offsets": [0, 4]}, "b": {"shape": [2], "data_offsets": [4, 12]}})
    whole = len(table).to_bytes(8, "little") + table.encode() + bytes(12)
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[:-5])
    words = f"student.model: {path} is cut short: it has {len(whole) - 5} of {len(whole)} bytes"
    assert list(model_problems("student.model", tmp_path)) == [words]
    path.write_bytes(whole[:20])
    assert "cut short in its table" in "".join(model_problems("student.model", tmp_path))
    path.write_bytes(whole)
    assert not list(model_problems("student.model", tmp_path))


def test_a_weight_file_without_a_byte_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert "is not a safetensors file" in "".join(model_problems("student.model", tmp_path))


def test_weight_files_that_the_index_names_and_that_are_not_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    words = f"student.model: {tmp_path} has no two.safetensors, which model.safetensors.index.json names"
    assert list(model_problems("student.model", tmp_path)) == [words]


def test_a_generation_config_that_is_no_object_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for content in ("", "{", "[]"):
        (tmp_path / "generation_config.json").write_text(content)
        words = f"student.model: {tmp_path / 'generation_config.json'} is not a JSON object"
        assert list(model_problems("student.model", tmp_path, needs_weights=False)) == [words]
    (tmp_path / "generation_config.json").write_text("{}")
    assert not list(model_problems("student.model", tmp_path, needs_weights=False))
