"""Whole jobs on rows that say how much they count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import losses, run_job, serving_teacher, write_config

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Nothing.",
    "It returns a value when it is asked.",
    "And so on.",
)
WEIGHTS = (0.25, 3.0, 0, 1)


@pytest.fixture
def student(tiny_models: TinyModels) -> Path:
    return tiny_models.path("qwen3", seed=1)


def job(
    directory: Path, student: Path, weights: Sequence[object] = WEIGHTS, teacher: str | None = None, **sections: Any
) -> Path:
    directory.mkdir(exist_ok=True)
    rows = [{"text": text, "quality": weight} for text, weight in zip(TEXTS, weights, strict=True)]
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"format": "text", "path": str(path), "weight_column": "quality"}, "max_tokens": 64}
    tree = {"objective": {"name": "sft"}, "data": data, "batch": {"sequences": 3, "max_tokens": 64}, **sections}
    return write_config(directory, student=student, teacher=teacher, steps=4, checkpoint={"every": 2}, **tree)


def test_a_job_minimises_the_weighted_mean_and_goes_on_exactly(student: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    total = weights = 0.0
    for text, weight in zip(TEXTS, WEIGHTS, strict=True):
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            total += weight * float(cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum"))
        weights += weight * (len(ids) - 1)
    whole, parts = (job(tmp_path / name, student) for name in ("whole", "parts"))
    for config, *overrides in ((whole,), (parts, "steps=2"), (parts,)):
        for outcome in run_job(config, *overrides, ranks=2):
            assert outcome.exit_code == 0, outcome.errors
    found = losses(tmp_path / "whole" / "run")
    assert found[0] == pytest.approx(total / weights, rel=1e-5)
    assert losses(tmp_path / "parts" / "run") == found
    cache = f"data.token_cache={{directory: {tmp_path / 'cache'}}}"
    (outcome,) = run_job(whole, cache, f"output={tmp_path / 'stored'}", "steps=1")
    assert outcome.exit_code == 0, outcome.errors
    assert losses(tmp_path / "stored")[0] == pytest.approx(found[0], rel=1e-6)
    (refused,) = run_job(job(tmp_path / "whole", student, weights=(0.25, 3.5, 0, 1)), "steps=9")
    assert refused.exit_code == 2
    assert "data.weight_column (digest) is" in refused.errors


def test_a_job_distils_rows_that_weigh_differently(student: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    with serving_teacher(tmp_path, tiny_models.path("qwen3", seed=2)) as address:
        objective = {"name": "distill", "ce_weight": 0.1}
        (outcome,) = run_job(job(tmp_path / "job", student, teacher=address, objective=objective))
    assert outcome.exit_code == 0, outcome.errors
    [first, *_] = [json.loads(line) for line in (tmp_path / "job" / "run" / "metrics.jsonl").read_text().splitlines()]
    unweighted = first["divergence_nats_per_token"] + 0.1 * first["cross_entropy_nats_per_token"]
    assert first["loss_nats_per_token"] != pytest.approx(unweighted, rel=1e-4)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (-0.5, "quality is -0.5; a weight must be finite and not negative"),
        ("high", "quality is 'high'; a weight must be a number, not str"),
        (None, "no column 'quality', which weight_column names; columns found: text, quality (null)"),
    ],
)
def test_a_weight_that_is_none_is_refused_with_its_place(
    student: Path, tmp_path: Path, weight: object, words: str
) -> None:
    (refused,) = run_job(job(tmp_path / "job", student, weights=(1, weight, 1, 1)))
    assert refused.exit_code == 2
    assert f"texts.jsonl:2: {words}" in refused.errors
