"""Whole jobs whose matrices Muon moves."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import evaluations, losses, run_job, write_config


def job(directory: Path, student: Path) -> Path:
    directory.mkdir()
    return write_config(
        directory,
        student=student,
        teacher=None,
        steps=6,
        objective={"name": "sft"},
        optimizer={"name": "muon", "learning_rate": 5e-3, "schedule": "constant"},
        checkpoint={"every": 3},
    )


def test_a_job_learns_and_goes_on_exactly(tiny_models: TinyModels, tmp_path: Path) -> None:
    student = tiny_models.path("qwen3", seed=1, tie_word_embeddings=True)
    whole, parts = (job(tmp_path / name, student) for name in ("whole", "parts"))
    for config, *overrides in ((whole,), (parts, "steps=3"), (parts,)):
        for outcome in run_job(config, *overrides, ranks=2):
            assert outcome.exit_code == 0, outcome.errors
    run = tmp_path / "whole" / "run"
    assert losses(tmp_path / "parts" / "run") == losses(run)
    scores = evaluations(run)
    assert scores[6]["cross_entropy_nats_per_token"] < 0.95 * scores[0]["cross_entropy_nats_per_token"]
    (refused,) = run_job(whole, "optimizer={learning_rate: 0.005}", "steps=9")
    assert refused.exit_code == 2
    assert "optimizer.name is None now and was muon" in refused.errors
