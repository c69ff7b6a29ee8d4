"""lm-evaluation-harness judges a model, and a run's final one, by a task of a file."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.tiny_models import TinyModels
from tests.system.training import KDMESH

QUESTIONS = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(12)]


def asked(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [KDMESH, "lm-eval", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    directory = tmp_path / "tasks"
    directory.mkdir()
    data = directory / "parity.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    task = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": [" yes", " no"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "parity.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return directory


@pytest.mark.slow
def test_a_run_s_final_model_is_judged_by_a_task_of_a_file(
    tiny_models: TinyModels, tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    run = tmp_path / "run"
    run.mkdir()
    (run / "final").symlink_to(tiny_models.path("qwen3", seed=1))
    written = tmp_path / "found.json"
    said = asked(run, "--tasks", "parity", "--include", tasks, "--output", written, "--device", "cpu")
    assert said.returncode == 0, said.stderr
    figures = json.loads(said.stdout.splitlines()[-1])
    accuracy = figures["parity"]["acc,none"]
    assert accuracy * len(QUESTIONS) == pytest.approx(round(accuracy * len(QUESTIONS)))
    assert json.loads(written.read_text())["results"]["parity"]["acc,none"] == accuracy
    unknown = asked(run, "--tasks", "parity,oddity", "--include", tasks)
    assert unknown.returncode != 0
    assert "the harness has no task oddity" in unknown.stderr


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    said = asked(tmp_path, "--tasks", "parity")
    assert said.returncode != 0
    assert "is no model's directory, and no run that has ended" in said.stderr
