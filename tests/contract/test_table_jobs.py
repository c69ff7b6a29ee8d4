"""Whole jobs on tables: what a CSV file and a saved dataset say is trained on and judged."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.support.saved_datasets import save_to_disk
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import evaluations, losses, run_job, write_config


def test_a_job_learns_the_same_from_a_table_and_from_lines(tiny_models: TinyModels, tmp_path: Path) -> None:
    student = tiny_models.path("qwen3", seed=1)
    rows = [{"prompt": f"what is\n{n}?", "completion": "it is " + "so " * (n % 7 + 1)} for n in range(12)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    saved = save_to_disk(tmp_path / "saved", [rows[:5], rows[5:]])
    found = []
    for train, held_out in ((lines, lines), (tmp_path / "a.csv", saved), (saved, tmp_path / "a.csv")):
        directory = tmp_path / f"job-{train.name}"
        directory.mkdir()
        files = {
            name: {"format": "chat", "path": str(path)} for name, path in (("train", train), ("held_out", held_out))
        }
        config = write_config(
            directory,
            student=student,
            teacher=None,
            steps=3,
            objective={"name": "sft"},
            data={**files, "max_tokens": 64},
            batch={"sequences": 4, "max_tokens": 128},
        )
        (outcome,) = run_job(config)
        assert outcome.exit_code == 0, outcome.errors
        judged = evaluations(directory / "run")[3]
        found.append((losses(directory / "run"), judged["cross_entropy_nats_per_token"]))
    assert found[0] == found[1] == found[2]
