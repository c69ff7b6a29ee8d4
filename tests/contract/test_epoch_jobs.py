"""Whole jobs whose number of steps follows from their data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.teacher_process import wait_event
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import (
    checkpoint_steps,
    evaluations,
    losses,
    records,
    run_job,
    started_job,
    write_config,
)
from tests.support.trainer_ranks import finish

# 30 rows, 4 in a step: 29 of them once the longest is left out.
EPOCHS = 4
STEPS = 29


@pytest.fixture(scope="module")
def student(tiny_models: TinyModels) -> Path:
    return tiny_models.path("qwen3", seed=1)


def job(directory: Path, student: Path) -> Path:
    """Whose last row is dropped, since it is too long."""
    directory.mkdir(exist_ok=True)
    path = write_config(
        directory,
        student=student,
        teacher=None,
        steps=1,
        objective={"name": "sft"},
        optimizer={"learning_rate": 0.01, "schedule": "linear", "warmup_steps": 2},
        evaluation={"every": 10},
        checkpoint={"every": 4, "keep": 1},
    )
    rows = (directory / "train.jsonl").read_text().splitlines()
    long = {"messages": [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "the quick " * 99}]}
    (directory / "train.jsonl").write_text("\n".join([*rows[:-1], json.dumps(long)]))
    return path


def sets(epochs: float) -> tuple[str, ...]:
    return ("steps=null", f"epochs={epochs}", "data.too_long=drop")


def rates(run: Path) -> list[float]:
    return [step["learning_rate"] for step in records(run, "step")]


@pytest.fixture(scope="module")
def whole_run(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    (outcome,) = run_job(job(directory, student), *sets(EPOCHS))
    assert outcome.exit_code == 0, outcome.errors
    assert f'"steps": {STEPS}, ' in outcome.errors
    return directory / "run"


def test_epochs_make_steps_of_the_sequences_that_are_left(whole_run: Path, student: Path, tmp_path: Path) -> None:
    (outcome,) = run_job(job(tmp_path, student), f"steps={STEPS}", "data.too_long=drop")
    assert outcome.exit_code == 0, outcome.errors
    assert list(losses(whole_run)) == list(range(STEPS))
    assert losses(whole_run) == losses(tmp_path / "run")
    assert rates(whole_run) == rates(tmp_path / "run")
    assert rates(whole_run)[-1] == pytest.approx(0.001)
    assert list(evaluations(whole_run)) == [0, 10, 20, STEPS]
    assert checkpoint_steps(whole_run) == [STEPS]


def test_a_run_by_epochs_that_was_killed_goes_on_exactly(whole_run: Path, student: Path, tmp_path: Path) -> None:
    config = job(tmp_path, student)
    with started_job(config, *sets(EPOCHS), ranks=1) as ranks:
        wait_event(ranks[0], "checkpoint written")
        ranks[0].kill()
        finish(ranks)
    assert len(losses(tmp_path / "run")) < STEPS
    for outcome in run_job(config, *sets(EPOCHS)):
        assert outcome.exit_code == 0, outcome.errors
    assert losses(tmp_path / "run") == losses(whole_run)
    assert rates(tmp_path / "run") == rates(whole_run)


def test_more_epochs_extend_a_finished_run_and_fewer_are_refused(student: Path, tmp_path: Path) -> None:
    config = job(tmp_path, student)
    for epochs, steps in ((1, 8), (1.5, 11)):
        (outcome,) = run_job(config, *sets(epochs))
        assert outcome.exit_code == 0, outcome.errors
        assert list(losses(tmp_path / "run")) == list(range(steps))
    (outcome,) = run_job(config, *sets(1))
    assert outcome.exit_code == 2
    assert "is after 11 steps, and the run is to have only 8: raise `steps`, or `epochs`" in outcome.errors
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["config"]["epochs"] for start in starts] == [1, 1.5]  # what was refused has not been started


def test_epochs_too_short_for_the_warm_up_are_refused_before_weights_are_loaded(student: Path, tmp_path: Path) -> None:
    empty = shutil.copytree(student, tmp_path / "student")
    (empty / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # of no tensor
    (outcome,) = run_job(job(tmp_path, empty), *sets(1), "optimizer.warmup_steps=8")
    assert outcome.exit_code == 2
    assert "epochs (1) of 29 sequences, 4 in a step: optimizer.warmup_steps (8) must be less than" in outcome.errors
