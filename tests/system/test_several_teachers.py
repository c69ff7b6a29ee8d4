"""Jobs with two teachers of different widths; one of each kind is killed in the middle of a step, with a teacher."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import TinyModels
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job, Recipe

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Two teachers that serve."""

    code: Teacher
    maths: Teacher
    data: Path  # train.jsonl, with the teacher of each row

    def job(self, processes: Processes, directory: Path, student: Path, *, is_mixed: bool, **sections: Any) -> Job:
        """A job that learns from both."""
        weights = {"teacher_weights": {"code": 2, "maths": 1}} if is_mixed else {}
        recipe = Recipe(student=student, data=self.data, objective={"divergence": {"name": "forward_kl"}, **weights})
        data: dict[str, Any] = {"max_tokens": 96, "train": {"format": "chat", "path": str(self.data / "train.jsonl")}}
        data["held_out"] = data["train"]
        addresses = {"code": [self.code.address], "maths": [self.maths.address]}
        return Job(
            processes,
            directory,
            recipe,
            data=data if is_mixed else {**data, "teacher_column": "who"},
            teachers={name: {"addresses": where, "deadline_s": 100} for name, where in addresses.items()},
            **{"evaluation": {"every": 8, "max_sequences": 6}, "steps": 10, **sections},
        )


@pytest.fixture(scope="module")
def panel(
    materials: Materials, tiny_models: TinyModels, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Panel:
    root = tmp_path_factory.mktemp("panel")
    rows = [json.loads(line) for line in (materials.data / "train.jsonl").read_text().splitlines()]
    named = [{**row, "who": ("code", "maths", "code")[number % 3]} for number, row in enumerate(rows)]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, named)), encoding="utf-8")
    narrow = tiny_models.path("llama", seed=3, hidden_size=24, vocab_size=352)
    teachers = [
        Teacher(processes, root / name, model) for name, model in (("code", materials.teacher), ("maths", narrow))
    ]
    for teacher in teachers:
        teacher.start()
    return Panel(code=teachers[0], maths=teachers[1], data=root)


@pytest.mark.parametrize("is_mixed", [False, True], ids=["each row its own teacher", "a mixture"])
def test_a_job_that_was_killed_continues_with_equal_losses(
    panel: Panel, materials: Materials, processes: Processes, tmp_path: Path, is_mixed: bool
) -> None:
    whole, killed = (
        panel.job(processes, tmp_path / name, materials.plain.student, is_mixed=is_mixed)
        for name in ("whole", "killed")
    )
    gate = killed.gate(20 if is_mixed else 32)  # after the first checkpoint
    trainers = [whole.start(), killed.start()]
    trainers[1].until(gate.is_reached)
    trainers[1].signal(signal.SIGKILL)
    trainers[1].exit_code()
    gate.remove()
    panel.maths.process.signal(signal.SIGKILL)  # the other job may wait for it, and keeps the rows of its code teacher
    panel.maths.start()
    again = killed.start()
    trainers[0].succeed()
    again.succeed()
    (event,) = again.events("continuing from a checkpoint")
    assert event["step"] > 0
    assert killed.record() == whole.record()
    _assert_refused_as_another_run(killed, panel, is_mixed=is_mixed)
    steps = whole.steps()
    for step in steps:
        tokens = [step["teacher_tokens.code"], step["teacher_tokens.maths"]]
        assert tokens == [step["num_tokens"]] * 2 if is_mixed else sum(tokens) == step["num_tokens"]
        assert step["teacher_wait_fraction.code"] >= 0
    assert steps[-1]["divergence_nats_per_token"] < steps[0]["divergence_nats_per_token"]


def _assert_refused_as_another_run(job: Job, panel: Panel, *, is_mixed: bool) -> None:
    """With other weights, or with the two teachers' names exchanged, it is not what the checkpoint is of."""
    exchanged = {"code": panel.maths.address, "maths": panel.code.address}
    other = [f"teachers.{name}.addresses=['{address}']" for name, address in exchanged.items()]
    refused = job.start("steps=12", *(["objective.teacher_weights.code=5"] if is_mixed else other))
    assert refused.exit_code() == 2
    assert any(
        ("objective is" if is_mixed else "teachers.code (fingerprint) is") in sentence for sentence in refused.words()
    )


def test_a_students_own_samples_are_scored_by_the_teacher_of_their_prompt(
    panel: Panel, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    student, jobs = materials.plain.student, []
    for name, early_rows_mib in (("early", 64), ("late", 0)):
        rollouts = Rollouts(processes, tmp_path / f"rollouts-{name}", student)
        rollouts.start()
        source = {
            "kind": "on_policy",
            "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
            "sampled_fraction": 0.7,
            "sampling": {"max_new_tokens": 16},
            "early_rows_mib": early_rows_mib,
        }
        jobs.append(
            panel.job(processes, tmp_path / name, student, is_mixed=False, source=source, steps=3, evaluation={})
        )
    for trainer in [job.start() for job in jobs]:
        trainer.succeed()
    early, late = jobs
    assert early.record() == late.record()
    for step in early.steps():
        assert step["teacher_tokens.code"] > 0
        assert step["teacher_tokens.code"] + step["teacher_tokens.maths"] == step["num_tokens"]
        assert step["teacher_entropy_nats"] > 0
