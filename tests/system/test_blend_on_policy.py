"""On-policy jobs on a blend: prompts and answers keep its proportions, in memory as in files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainer_jobs import write_chats
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 4
WEIGHTS = {"words": 3, "more": 1}


def test_samples_and_answers_come_from_each_dataset_by_its_weight(
    materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    datasets = {
        name: {
            "format": "chat",
            "path": str(write_chats(tmp_path / "data" / f"{name}.jsonl", 12, seed=weight)),
            "weight": weight,
        }
        for name, weight in WEIGHTS.items()
    }
    teacher = Teacher(processes, tmp_path / "teacher", materials.teacher)
    teacher.start()
    jobs = []
    for name, cache in (("memory", None), ("files", {"directory": str(tmp_path / "tokens"), "workers": 1})):
        rollouts = Rollouts(processes, tmp_path / f"rollouts-{name}", materials.plain.student)
        rollouts.start()
        data: dict[str, Any] = {"max_tokens": 96, "train": {"format": "blend", "datasets": datasets}}
        source = {
            "kind": "on_policy",
            "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
            "sampled_fraction": 0.5,
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 16},
        }
        job = Job(
            processes,
            tmp_path / name,
            materials.plain,
            teacher.address,
            data={**data, "token_cache": cache},
            source=source,
            batch={"sequences": 8, "max_tokens": 128},
            steps=STEPS,
            evaluation={},
        )
        jobs.append(job)
    for trainer in [job.start() for job in jobs]:
        trainer.succeed()
    in_memory, in_files = jobs
    assert in_memory.record() == in_files.record()
    drawn: Counter[str] = Counter()
    for step in in_files.steps():
        drawn.update({name: step[f"dataset_sequences.{name}"] for name in WEIGHTS})
    # Four samples of two prompts and four answers in each step: 8 prompts and 16 answers in all.
    assert drawn == {"words": 2 * 6 + 12, "more": 2 * 2 + 4}
