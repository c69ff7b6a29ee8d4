"""On-policy jobs of models that attend in other ways than most, with the real services, in two parts."""

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

STEPS = 5
# Of a student and its teacher.
FAMILIES = {
    "attention sinks": ("gpt_oss", "gpt_oss"),
    "linear attention": ("qwen3_5_text", "qwen3_next"),
    "Mamba-2": ("falcon_h1", "nemotron_h"),
    "short convolutions": ("lfm2", "lfm2_moe"),
}


@pytest.mark.parametrize("which", FAMILIES)
def test_a_student_is_sampled_from_as_it_is_trained_also_when_it_goes_on(
    materials: Materials, processes: Processes, tiny_models: TinyModels, tmp_path: Path, which: str
) -> None:
    families = FAMILIES[which]
    student = tiny_models.path(families[0], seed=1)
    teacher = Teacher(processes, tmp_path / "teacher", tiny_models.path(families[1], seed=2, vocab_size=336))
    server = Rollouts(processes, tmp_path / "rollouts", student, engine={"deterministic": False})
    job = Job(
        processes,
        tmp_path / "job",
        replace(materials.plain, student=student),
        teacher.address,
        steps=STEPS,
        source={
            "kind": "on_policy",
            "rollouts": {"addresses": [server.address], "deadline_s": 100},
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 24},
        },
        checkpoint={"every": 2},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
    )
    teacher.start()
    server.start()
    job.start_ranks(2, "steps=2").succeed()
    job.start_ranks(2).succeed()
    assert len(job.steps()) == STEPS
    for step in job.steps():
        assert 0 <= step["sampler_kl_k3_nats"] < 1e-8  # with the weights of the step before, 3e-2
    before, after = (load_file(path / "model.safetensors") for path in (student, job.output / "final"))
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())
