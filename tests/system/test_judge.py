"""On-policy jobs whose samples are judged, with the real services."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kdmesh_trainer.sources.order import step_order
from tests.support.trainer_jobs import write_chats
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS, PROMPTS, ROWS = 6, 2, 30
SILENT_STEPS = (0, 1, 3)


def write_rows(path: Path, *, level: float = 1.0) -> Path:
    """Chats of `level`, but for those of the steps of which no sample is to count."""
    chats = [json.loads(line) for line in write_chats(path, ROWS, seed=1).read_text().splitlines()]
    order = step_order(chats, per_step=PROMPTS, seed=0)
    silent = {index for step in SILENT_STEPS for index in order.of_step(step)}
    rows = [{**chat, "level": 0 if index in silent else level} for index, chat in enumerate(chats)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def judged(rollouts: Rollouts, path: Path, judge: dict[str, Any], **source: Any) -> dict[str, Any]:
    """The sections of a job."""
    return {
        "data": {"max_tokens": 96, "train": {"format": "chat", "path": str(path)}},
        "batch": {"sequences": 2 * PROMPTS, "max_tokens": 128},
        "steps": STEPS,
        "evaluation": {},
        "source": {
            "kind": "on_policy",
            "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 16},
            "judge": judge,
            **source,
        },
    }


def test_a_job_that_skips_steps_goes_on_exactly_and_with_no_other_judge(
    materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "train.jsonl")
    teacher = Teacher(processes, tmp_path / "teacher", materials.teacher)
    teacher.start()
    judge = {"name": "custom", "target": "tests.system.judges:by_level", "params": {"per_letter": 0.01}}
    jobs = {}
    for name in ("whole", "parts"):
        rollouts = Rollouts(processes, tmp_path / f"rollouts-{name}", materials.plain.student)
        rollouts.start()
        jobs[name] = Job(processes, tmp_path / name, materials.plain, teacher.address, **judged(rollouts, path, judge))
    whole = jobs["whole"].start_ranks(2)
    jobs["parts"].start_ranks(2, "steps=2").succeed()  # nothing is learnt, so there are no moments
    jobs["parts"].start_ranks(2, "steps=4").succeed()
    jobs["parts"].start_ranks(2).succeed()
    whole.succeed()
    assert jobs["parts"].record() == jobs["whole"].record()
    steps = jobs["whole"].steps()
    assert [step["step"] for step in steps if step["loss_nats_per_token"] is None] == list(SILENT_STEPS)
    assert [step["step"] for step in steps if step["left_out_fraction"] == 1] == list(SILENT_STEPS)
    assert {step["judge_errors"] for step in steps} == {0}
    assert all(step["sample_weight_mean"] > 0.5 for step in steps if step["step"] not in SILENT_STEPS)
    assert len(whole.events("no sample of this step has weight, so it is skipped")) == len(SILENT_STEPS)
    [ended] = whole.events("run ended")
    assert ended["skipped_steps"] == len(SILENT_STEPS)
    refused = jobs["whole"].start_ranks(2, "steps=7", "source.judge.params.per_letter=0.02")
    assert refused.exit_code() == 2
    assert "per_letter" in " ".join(refused.words())
    write_rows(path, level=2)
    refused = jobs["whole"].start_ranks(2, "steps=7")
    assert refused.exit_code() == 2
    assert "source.judge's rows (digest) is" in " ".join(refused.words())


def test_answers_of_the_data_have_weights_of_their_own_beside_samples_that_are_matched(
    materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "train.jsonl", level=3)
    teacher = Teacher(processes, tmp_path / "teacher", materials.teacher)
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    teacher.start()
    rollouts.start()
    match = {"name": "regex", "pattern": "(?s).*"}
    judge = {"name": "match", "match": match, "wrong": 0.2, "cut": 0.5}
    sections = judged(rollouts, path, judge, sampled_fraction=0.5, max_staleness=1)
    sections["data"]["train"]["weight_column"] = "level"
    job = Job(processes, tmp_path / "job", materials.plain, teacher.address, **sections)
    job.start_ranks(2).succeed()
    assert len(job.steps()) == STEPS
    for step in job.steps():
        assert math.isfinite(step["loss_nats_per_token"])
        assert step["right_fraction"] == 0  # no sample of a random model is the answer
        assert step["left_out_fraction"] == 0
        cut = step["cut_off_fraction"]
        assert step["sample_weight_mean"] == pytest.approx(0.5 * cut + 0.2 * (1 - cut))
