"""`kdmesh evaluate` keeps what rollout servers have answered when it ends early."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_config
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.training import KDMESH

pytestmark = pytest.mark.slow

NUMBER = 30
SAMPLES = 2


def lines(path: Path) -> dict[str, dict[str, Any]]:
    return {line["asked"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_what_was_answered_before_a_server_was_gone_or_ctrl_c_came_is_kept(
    tiny_models: TinyModels, processes: Processes, tmp_path: Path
) -> None:
    model = tiny_models.path()
    rollouts = Rollouts(processes, tmp_path / "rollouts", model, can_be_held=True, engine={"max_running": 1})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"what is {i}?", "answer": i}) + "\n" for i in range(NUMBER)))
    asked = {
        "path": str(questions),
        "samples": SAMPLES,
        "sampling": {"max_new_tokens": 32, "temperature": 1},
        "match": {"name": "last_number"},
    }
    answerers = {"addresses": [rollouts.address], "deadline_s": 6}
    config = write_config(
        tmp_path, student=model, teacher="a:1", steps=1, evaluation={"questions": asked, "rollouts": answerers}
    )

    def evaluate(output: Path) -> Process:
        return processes.start("evaluate", tmp_path, KDMESH, "evaluate", str(config), "--output", str(output))

    def answer_some(output: Path) -> Process:
        """Begin to evaluate, and hold the server when it has answered some of the questions."""
        rollouts.hold()
        evaluating = evaluate(output)
        evaluating.until(lambda: rollouts.num_waiting() >= NUMBER * SAMPLES - 1)
        rollouts.let_go()
        evaluating.until(lambda: rollouts.num_waiting() < NUMBER * SAMPLES - 10)
        rollouts.hold()
        return evaluating

    rollouts.start()
    rollouts.wait_ready()
    evaluate(tmp_path / "whole.jsonl").succeed()
    whole = lines(tmp_path / "whole.jsonl")
    for name, ends, status in (("interrupted", signal.SIGINT, 130), ("left", signal.SIGKILL, 2)):
        evaluating = answer_some(tmp_path / f"{name}.jsonl")
        (evaluating if name == "interrupted" else rollouts.process).signal(ends)
        assert evaluating.exit_code() == status
        kept = tmp_path / f"{name}.jsonl.incomplete"
        early = lines(kept)
        assert 0 < len(early) < NUMBER
        assert early == {question: whole[question] for question in early}
        assert any(f"all their answers, {len(early)} of them, are in {kept}" in words for words in evaluating.words())
        assert not (tmp_path / f"{name}.jsonl").exists()
        rollouts.let_go()
