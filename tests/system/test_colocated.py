"""A job whose servers sleep in turn, and are found asleep by whoever comes after it was killed."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tests.support.trainer_jobs import write_questions
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 6


def test_a_job_whose_servers_sleep_in_turn_learns_exactly_the_same_after_it_was_killed_too(
    materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("s")  # short: Unix sockets have short names
    recipe = replace(materials.plain, is_judged=True)
    teacher = Teacher(processes, root / "teacher", materials.teacher)
    rollouts = Rollouts(processes, root / "rollouts", recipe.student)
    questions = {"path": str(write_questions(root / "questions.jsonl", 4, seed=3)), "sampling": {"max_new_tokens": 8}}
    colocated, plain = (
        Job(
            processes,
            root / name,
            recipe,
            teacher.address,
            steps=STEPS,
            checkpoint={"every": 2},
            evaluation={"every": 2, "questions": questions},
            source={
                "kind": "on_policy",
                "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
                "samples_per_prompt": 2,
                "sampling": {"max_new_tokens": 24},
                "colocated": name == "colocated",
            },
        )
        for name in ("colocated", "plain")
    )
    teacher.start()
    rollouts.start()
    killed = colocated.start()
    killed.until(lambda: len(colocated.steps()) >= 3)
    killed.signal(signal.SIGKILL)
    killed.exit_code()
    found = [server.get("/readyz") for server in (teacher, rollouts)]
    assert any("the server sleeps" in answer.get("reason", "") for answer in found)
    plain.start().succeed()  # it wakes both
    colocated.start().succeed()
    assert colocated.record() == plain.record()
    for server in (teacher, rollouts):
        assert len(server.process.events("asleep")) >= STEPS
        assert server.get("/readyz") == {"status": "ready"}
