"""Whole jobs that are judged on a share of their own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import evaluations, run_job, write_chats, write_config


def event(errors: str, name: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    return next(line for line in lines if line["event"] == name)


def test_a_share_of_the_rows_is_judged_the_same_on_any_number_of_ranks_and_the_rest_makes_the_epoch(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, student=tiny_models.path("qwen3", seed=1), teacher=None, steps=1, objective={"name": "sft"}
    )
    sets = ("steps=null", "data.held_out=0.2")
    (outcome,) = run_job(config, *sets, "epochs=1")
    assert outcome.exit_code == 0, outcome.errors
    counted, first = event(outcome.errors, "epochs counted"), evaluations(tmp_path / "run")
    judged = first[0]["num_sequences"]
    assert 0 < judged < 15
    assert counted["sequences"] == 30 - judged
    steps = counted["steps"]
    assert list(first) == [0, steps]
    for outcome in run_job(config, *sets, "epochs=1.5", ranks=2):
        assert outcome.exit_code == 0, outcome.errors
    longer = evaluations(tmp_path / "run")
    assert {scores["num_sequences"] for scores in longer.values()} == {judged}
    assert {scores["num_loss_tokens"] for scores in longer.values()} == {first[0]["num_loss_tokens"]}
    (refused,) = run_job(config, *sets, "epochs=2", "data.held_out=0.3")
    assert refused.exit_code == 2
    assert "data.held_out is 0.3 now and was 0.2" in refused.errors


def test_several_datasets_are_judged_apart(tiny_models: TinyModels, tmp_path: Path) -> None:
    files = {name: write_chats(tmp_path / f"{name}.jsonl", count, seed=9) for name, count in (("code", 3), ("talk", 4))}
    sets = {name: {"format": "chat", "path": str(path)} for name, path in files.items()}
    config = write_config(
        tmp_path, student=tiny_models.path("qwen3", seed=1), teacher=None, steps=1, objective={"name": "sft"}
    )
    several = f"data.held_out={json.dumps({'format': 'several', 'datasets': sets})}"
    (outcome,) = run_job(config, several)
    assert outcome.exit_code == 0, outcome.errors
    for scores in evaluations(tmp_path / "run").values():
        assert [scores[f"num_sequences{name}"] for name in ("", ".code", ".talk")] == [7, 3, 4]
        parts = [scores["num_loss_tokens.code"], scores["num_loss_tokens.talk"]]
        assert scores["num_loss_tokens"] == sum(parts)
        entropies = [scores[f"cross_entropy_nats_per_token.{name}"] for name in ("code", "talk")]
        assert entropies[0] != entropies[1]
        mean = sum(entropy * count for entropy, count in zip(entropies, parts, strict=True)) / sum(parts)
        assert abs(scores["cross_entropy_nats_per_token"] - mean) < 1e-9
    files["talk"].unlink()
    (refused,) = run_job(config, several)
    assert refused.exit_code == 2
    assert "talk.jsonl" in refused.errors
