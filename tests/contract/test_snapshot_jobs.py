"""A whole job that writes students on the way, and keeps the best one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import evaluations, run_job, write_chats, write_config

pytestmark = pytest.mark.slow


def test_a_job_writes_students_on_the_way_and_keeps_the_best_of_those_that_were_judged(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    student = tiny_models.path("qwen3", seed=1)
    held_out = write_chats(tmp_path / "held_out.jsonl", 8, seed=3)
    config = write_config(
        tmp_path,
        student=student,
        teacher=None,
        steps=5,
        objective={"name": "sft"},
        # So large that held-out text, which is another, soon gets less likely: the last student is not the best.
        optimizer={"learning_rate": 0.3, "schedule": "constant"},
        data={
            "train": {"format": "chat", "path": str(write_chats(tmp_path / "train.jsonl", 2, seed=1))},
            "held_out": {"format": "chat", "path": str(held_out)},
            "max_tokens": 128,
        },
        evaluation={"every": 1},
        export={"every": 2, "best": "cross_entropy_nats_per_token", "dtype": "bfloat16"},
    )
    for outcome in run_job(config, ranks=2):
        assert outcome.exit_code == 0, outcome.errors
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "models").iterdir()) == ["step-00000002", "step-00000004"]
    for path in (*(run / "models").iterdir(), run / "best", run / "final"):
        assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.bfloat16}
        AutoTokenizer.from_pretrained(path)
    judged = {done: found["cross_entropy_nats_per_token"] for done, found in evaluations(run).items() if done > 0}
    best = min(judged, key=lambda done: judged[done])
    assert best != 5
    note = json.loads((run / "best" / "kdmesh.json").read_text())
    assert note == {"step": best, "cross_entropy_nats_per_token": judged[best], "judged_by": note["judged_by"]}
    if best in (2, 4):
        same = [AutoModelForCausalLM.from_pretrained(run / name) for name in ("best", f"models/step-{best:08d}")]
        assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in same), strict=True))
    # The same run judged on other data: what it kept is nothing to compare with.
    others = write_chats(tmp_path / "others.jsonl", 3, seed=4)
    (outcome,) = run_job(config, f"data.held_out.path={others}", "steps=6", "export.every=null")
    assert outcome.exit_code == 0, outcome.errors
    found = json.loads((run / "best" / "kdmesh.json").read_text())
    again = {done: scores["cross_entropy_nats_per_token"] for done, scores in evaluations(run).items() if done >= 5}
    assert found["cross_entropy_nats_per_token"] == min(again.values())
    assert found["judged_by"] != note["judged_by"]
