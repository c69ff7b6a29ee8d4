"""`kdmesh plan` as people call it: what a file says changes what is planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_config


@pytest.fixture
def config(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return write_config(tmp_path, student=tiny_models.path("qwen3", seed=1), teacher="127.0.0.1:1", steps=1)


def plan(config: Path, *arguments: str, code: int = 0) -> str:
    command = [str(Path(sys.executable).with_name("kdmesh")), "plan", str(config), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def planned(config: Path, *overrides: str) -> dict[str, Any]:
    sets = [part for override in overrides for part in ("--set", override)]
    told: dict[str, Any] = json.loads(plan(config, "--json", *sets))
    return told


def test_adapters_and_checkpoints_of_the_file_are_planned_for(config: Path) -> None:
    whole = planned(config)
    assert whole["tokens_per_micro_batch"] == 192
    adapters = planned(config, "student.lora={rank: 4}", "student.activation_checkpointing=all")
    assert adapters["rank_bytes_between_steps"]["AdamW"] < 0.5 * whole["rank_bytes_between_steps"]["AdamW"]
    assert adapters["rank_peak_bytes"] < whole["rank_peak_bytes"]


def test_the_table_names_each_part_and_the_teacher_s_server(
    config: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    server = tmp_path / "teacher.yaml"
    engine = {"kind": "transformers", "model": str(tiny_models.path("qwen3", seed=2))}
    server.write_text(yaml.safe_dump({"engine": engine, "slab": {"slots": 4, "slot_mib": 3}}), encoding="utf-8")
    table = plan(config, "--ranks", "2", "--device", "cpu", "--serve", str(server))
    assert table.startswith("One of 2 ranks, cpu, at its worst moment (")
    for part in ("parameters", "AdamW", "loss", "teacher's head", "in all"):
        assert part in table
    assert "slab 12 MiB of shared memory" in table


def test_what_cannot_be_planned_for_is_said_in_a_sentence(config: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake.yaml"
    fake.write_text("engine: {kind: fake}\n", encoding="utf-8")
    assert "does not configure a teacher with a model" in plan(config, "--serve", str(fake), code=2)
    assert "steps" in plan(config, "--set", "steps=0", code=2)
    assert "q_prog is unknown" in plan(config, "--set", "student.lora={target_modules: [q_prog]}", code=2)
