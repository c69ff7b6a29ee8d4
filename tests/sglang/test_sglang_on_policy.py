"""A student learns from its own samples, with SGLang under its teacher and under its rollout server, as processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.sglang_rollouts import rollout_tree
from tests.support.sglang_teachers import sglang_environment, teacher_tree
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import records, write_config

pytestmark = pytest.mark.sglang

STEPS = 4


def write(directory: Path, name: str, tree: dict[str, Any]) -> str:
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("dtype", "policy", "max_staleness", "tolerance"),
    [(torch.float32, "finish", 0, 1e-4), (torch.bfloat16, "continue", 1, 2e-2)],
    ids=["in-turn", "overlapped"],
)
def test_the_loop_learns_and_its_sampler_is_the_student(
    tiny_models: TinyModels,
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    policy: str,
    max_staleness: int,
    tolerance: float,
) -> None:
    directory = tmp_path_factory.mktemp("s")
    student, teacher = (tiny_models.path(seed=seed, dtype=dtype, initializer_range=0.02) for seed in (1, 2))
    source = {
        "kind": "on_policy",
        "rollouts": {"deadline_s": 120},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 24},
        "max_staleness": max_staleness,
        "update_policy": policy,
    }
    job = write_config(directory, student=student, teacher=None, steps=STEPS, source=source)
    services = [
        "--serve",
        write(directory, "teacher", teacher_tree(teacher)),
        "--serve-rollout",
        write(directory, "rollout", rollout_tree(student)),
    ]
    subprocess.run(
        [sys.executable, "-c", "from kdmesh.commands.cli import main; main()", "train", str(job), *services],
        env=sglang_environment(TMPDIR=str(directory)),
        check=True,
        timeout=360,
    )
    steps = records(directory / "run", "step")
    assert len(steps) == STEPS
    for step in steps:
        assert step["response_tokens_mean"] > 1
        if step["staleness_steps_max"] == 0:
            assert abs(step["sampler_kl_k1_nats"]) < tolerance
            assert 0 <= step["sampler_kl_k3_nats"] < tolerance**2
    assert max(step["staleness_steps_max"] for step in steps) <= max_staleness
