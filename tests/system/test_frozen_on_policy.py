"""An on-policy job that trains some of the student, with the real services."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_models import TinyModels
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 4
FROZEN = ("model.embed_tokens", "model.layers.0")


def test_the_sampler_is_the_student_with_what_is_frozen_in_it(
    materials: Materials, processes: Processes, tiny_models: TinyModels, tmp_path: Path
) -> None:
    # Frozen parameters rest in bfloat16, and the server serves float32.
    student = tiny_models.path("qwen3", seed=1, dtype=torch.bfloat16)
    recipe = replace(materials.plain, student=student)
    teacher = Teacher(processes, tmp_path / "teacher", materials.teacher)
    server = Rollouts(processes, tmp_path / "rollouts", student, engine={"dtype": "float32"})
    job = Job(
        processes,
        tmp_path / "job",
        recipe,
        teacher.address,
        steps=STEPS,
        source={
            "kind": "on_policy",
            "rollouts": {"addresses": [server.address], "deadline_s": 100},
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 24},
        },
        student={"model": str(student), "device": "cpu", "freeze": list(FROZEN)},
        export={"dtype": "float32"},
    )
    teacher.start()
    server.start()
    job.start_ranks(2).succeed()
    assert len(job.steps()) == STEPS
    for step in job.steps():
        assert 0 <= step["sampler_kl_k3_nats"] < 1e-8
    before, after = (load_file(path / "model.safetensors") for path in (student, job.output / "final"))
    for name, weight in before.items():
        assert torch.equal(after[name], weight.float()) is name.startswith(FROZEN), name
