"""Whole jobs whose student and teacher have layers that carry a state from token to token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import TinyModels
from tests.support.tiny_vision import TinyVisionModels, png
from tests.support.trainer_jobs import losses, records, run_job, run_whole_and_in_parts, serving_teacher, write_config


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [
        ("qwen3_5_text", "qwen3_next"),
        ("granitemoehybrid", "falcon_h1"),
        pytest.param("lfm2_moe", "nemotron_h", marks=pytest.mark.slow),
        pytest.param("nemotron_h", "lfm2", marks=pytest.mark.slow),
        pytest.param("falcon_h1", "bamba", marks=pytest.mark.slow),
    ],
)
def test_a_job_of_two_ranks_goes_on_and_writes_a_model(
    tiny_models: TinyModels, tmp_path: Path, of_student: str, of_teacher: str
) -> None:
    student, teacher = tiny_models.path(of_student, seed=1), tiny_models.path(of_teacher, seed=2)
    run = run_whole_and_in_parts(tmp_path, student=student, teacher=teacher)
    before, after = (dict(AutoModelForCausalLM.from_pretrained(p).named_parameters()) for p in (student, run / "final"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(after[name], parameter) for name, parameter in before.items())


def test_a_teacher_that_follows_the_student_differs_from_it_in_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    student = tiny_models.path("qwen3_5_moe_text", seed=1)
    objective = {"name": "distill", "divergence": {"name": "forward_kl"}, "ce_weight": 1.0}
    with serving_teacher(tmp_path, student, updatable=True) as address:
        config = write_config(tmp_path, student=student, teacher=address, steps=4, objective=objective)
        for outcome in run_job(config, "teacher.follows_student={every: 1}", "teacher.prefetch=0", ranks=2):
            assert outcome.exit_code == 0, outcome.errors
    steps = records(tmp_path / "run", "step")
    assert len(steps) == 4
    assert all(abs(step["divergence_nats_per_token"]) < 1e-6 for step in steps)
    assert len({step["loss_nats_per_token"] for step in steps}) == 4


def test_a_job_learns_from_images_with_the_files_of_a_qwen3_5(tiny_vision: TinyVisionModels, tmp_path: Path) -> None:
    student = tiny_vision.path("qwen3_5", seed=1)
    rows = []
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(24, 16 + 8 * (number % 3), seed=number))
        asked = [{"type": "image", "image": f"{number}.png"}] * (number % 2) + [{"type": "text", "text": "what is it"}]
        answer = {"role": "assistant", "content": f"the quick brown fox {number}"}
        rows.append(json.dumps({"messages": [{"role": "user", "content": asked}, answer]}))
    (tmp_path / "pictures.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = {"train": {"format": "chat", "path": str(tmp_path / "pictures.jsonl")}, "max_tokens": 128}
    with serving_teacher(tmp_path, tiny_vision.path("qwen3_5_moe", seed=2)) as address:
        config = write_config(tmp_path, student=student, teacher=address, steps=3, data=data)
        for outcome in run_job(config, "student.activation_checkpointing=all", ranks=2):
            assert outcome.exit_code == 0, outcome.errors
    assert len(losses(tmp_path / "run")) == 3
    before, after = (load_file(path / "model.safetensors") for path in (student, tmp_path / "run" / "final"))
    assert before.keys() == after.keys()
    for part in (".visual.", ".linear_attn.", ".self_attn."):
        assert any(part in name and not torch.equal(after[name], tensor) for name, tensor in before.items()), part
