"""An on-policy job that trains adapters, with the real services."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import TinyModels
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Two jobs of the same recipe, each with a rollout server of its own."""

    student: Path
    undisturbed: Job
    killed: Job  # after its checkpoint, and started again


@pytest.fixture(scope="module", params=["full", "nf4"])
def story(
    request: pytest.FixtureRequest,
    materials: Materials,
    tiny_models: TinyModels,
    processes: Processes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Story:
    root = tmp_path_factory.mktemp(f"lora-{request.param}")
    # 64 divides the inputs of every matrix of it, as four bits need it.
    even = tiny_models.path("qwen3", seed=1, hidden_size=64, head_dim=16)
    recipe = replace(materials.plain, is_judged=True, student=even)
    lora = {"rank": 8, "alpha": 32, "dropout": 0.0, "base": request.param}
    teacher = Teacher(processes, root / "teacher", materials.teacher)
    jobs, servers = [], []
    for name in ("undisturbed", "killed"):
        server = Rollouts(processes, root / f"rollouts-{name}", recipe.student)
        source = {
            "kind": "on_policy",
            "rollouts": {"addresses": [server.address], "deadline_s": 100},
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 24},
        }
        student = {"model": str(recipe.student), "device": "cpu", "lora": lora}
        sections = {"source": source, "student": student, "optimizer": {"learning_rate": 2e-2, "schedule": "constant"}}
        jobs.append(Job(processes, root / name, recipe, teacher.address, steps=STEPS, **sections))
        servers.append(server)
    for started in (teacher, *servers):
        started.start()
    undisturbed, killed = jobs
    running, first = undisturbed.start(), killed.start()
    first.until(lambda: len(killed.steps()) >= 6)
    first.signal(signal.SIGKILL)
    first.exit_code()
    for process in (running, killed.start()):
        process.succeed()
    return Story(student=recipe.student, undisturbed=undisturbed, killed=killed)


def test_held_out_distance_to_the_teacher_falls(story: Story) -> None:
    scores = [line["kl_nats_per_token"] for line in story.undisturbed.lines() if line["kind"] == "evaluation"]
    assert scores[-1] < 0.8 * scores[0]


def test_the_sampler_is_the_student_with_its_adapters(story: Story) -> None:
    for step in story.undisturbed.steps():
        assert abs(step["sampler_kl_k1_nats"]) < 1e-5
        assert 0 <= step["sampler_kl_k3_nats"] < 1e-8


def test_a_job_that_was_killed_learns_exactly_the_same(story: Story) -> None:
    assert len(story.undisturbed.steps()) == STEPS
    assert story.killed.record() == story.undisturbed.record()


def test_a_job_leaves_the_whole_model_and_the_adapter(story: Story) -> None:
    output = story.undisturbed.output
    told = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (8, 32, str(story.student))
    assert len(load_file(output / "adapter" / "adapter_model.safetensors")) == 2 * 14
    whole = AutoModelForCausalLM.from_pretrained(output / "final")
    token_ids = torch.arange(40)[None]
    with torch.no_grad():
        assert not torch.allclose(
            whole(token_ids).logits, AutoModelForCausalLM.from_pretrained(story.student)(token_ids).logits, atol=0.1
        )
