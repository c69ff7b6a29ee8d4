"""Whole jobs that do not train some of the student's parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import losses, run_job, write_config

FROZEN = ("model.embed_tokens", "model.layers.0")
FREEZE = f"student.freeze=[{', '.join(FROZEN)}]"


@pytest.fixture
def student(tiny_models: TinyModels) -> Path:
    return tiny_models.path("qwen3", seed=1)


def job(directory: Path, student: Path) -> Path:
    directory.mkdir()
    sft, every = {"name": "sft"}, {"every": 2}
    return write_config(directory, student=student, teacher=None, steps=4, objective=sft, checkpoint=every)


def test_a_job_trains_the_rest_and_goes_on_with_it(student: Path, tmp_path: Path) -> None:
    whole, parts = (job(tmp_path / name, student) for name in ("whole", "parts"))
    for config, *overrides in ((whole,), (parts, "steps=2"), (parts,)):
        for outcome in run_job(config, FREEZE, *overrides, ranks=2):
            assert outcome.exit_code == 0, outcome.errors
    run = tmp_path / "whole" / "run"
    assert losses(tmp_path / "parts" / "run") == losses(run)
    before, after = (dict(AutoModelForCausalLM.from_pretrained(p).named_parameters()) for p in (student, run / "final"))
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter) is name.startswith(FROZEN), name
    (refused,) = run_job(whole, "student.freeze=[lm_head]", "steps=9")
    assert refused.exit_code == 2
    assert "student.freeze is lm_head now and was model.embed_tokens, model.layers.0" in refused.errors


def test_a_name_that_is_none_is_refused_before_weights_are_loaded(student: Path, tmp_path: Path) -> None:
    (refused,) = run_job(job(tmp_path / "job", student), "student.freeze=[model.layer.0]")
    assert refused.exit_code == 2
    assert "student.freeze: model.layer.0 names no parameter; model has embed_tokens, layers, norm" in refused.errors
    assert "student loaded" not in refused.errors
