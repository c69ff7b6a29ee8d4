"""An on-policy job whose student computes with rounded matrices, with the real services."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import TinyModels
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 10


@pytest.fixture(scope="module")
def job(
    materials: Materials, tiny_models: TinyModels, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    root = tmp_path_factory.mktemp("quantization")
    # 32 divides the inputs of every matrix of it.
    even = tiny_models.path("qwen3", seed=1, hidden_size=64, head_dim=16)
    recipe = replace(materials.plain, is_judged=True, student=even)
    teacher = Teacher(processes, root / "teacher", materials.teacher)
    server = Rollouts(processes, root / "rollouts", recipe.student)
    source = {
        "kind": "on_policy",
        "rollouts": {"addresses": [server.address], "deadline_s": 100},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 24},
    }
    quantization = {"weights": "int4", "group_size": 32, "keep": ["model.layers.0.mlp.down_proj"]}
    sections = {
        "source": source,
        "student": {"model": str(even), "device": "cpu", "quantization": quantization},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "export": {"matrices": "both"},
    }
    made = Job(processes, root / "job", recipe, teacher.address, steps=STEPS, **sections)
    for started in (teacher, server):
        started.start()
    made.start().succeed()
    return made


def test_held_out_distance_to_the_teacher_falls(job: Job) -> None:
    scores = [line["kl_nats_per_token"] for line in job.lines() if line["kind"] == "evaluation"]
    assert scores[-1] < 0.9 * scores[0]


def test_the_sampler_has_the_probabilities_of_the_rounded_student(job: Job) -> None:
    assert len(job.steps()) == STEPS
    for step in job.steps():
        assert abs(step["sampler_kl_k1_nats"]) < 1e-5
        assert 0 <= step["sampler_kl_k3_nats"] < 1e-8


def test_a_job_leaves_the_rounded_student_and_its_masters(job: Job) -> None:
    final: Path = job.output / "final"
    told = json.loads((final / "config.json").read_text())["quantization_config"]
    assert (told["format"], told["ignore"]) == ("pack-quantized", ["model.layers.0.mlp.down_proj", "lm_head"])
    token_ids = torch.arange(40)[None]
    with torch.no_grad():
        rounded, masters = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(token_ids).logits
            for path in (final, final / "masters")
        )
    assert 0.01 < float((rounded - masters).norm() / masters.norm()) < 1
