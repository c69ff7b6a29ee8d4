"""Runs the demo through the command line, with real services: slow, by name only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdmesh.demo.corpus import build_corpus
from kdmesh.demo.plan import BRIEF, STANDARD
from kdmesh.demo.record import read_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = BRIEF.student_training.steps


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", "from kdmesh.commands.cli import main; main()", "demo", "--brief", *options]
    return subprocess.Popen(
        argv, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def last_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    figures: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return figures


def steps_done(run: Path) -> int:
    return read_record(run / "metrics.jsonl").done


def ours() -> list[int]:
    """Processes that descend from this one: services and trainers, and what other tests of it have left to it."""
    return [child.pid for child in psutil.Process().children(recursive=True)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demo_tells_its_story_and_ends_with_one_json_object(directory: Path) -> None:
    before = ours()
    figures = last_line(start(directory))
    assert {"kl_initial", "kl_sft", "kl_kd", "tokens_per_second", "teacher_wait_fraction"} <= figures.keys()
    assert 0 < figures["kl_kd"] < figures["kl_initial"]
    assert figures["handle_door"] == "shm"
    assert not figures["is_teacher_cached"]
    assert (directory / figures["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (directory / "runs/demo/kd/final/model.safetensors").is_file()
    assert ours() == before


def test_a_second_demo_finds_everything_done(directory: Path) -> None:
    begin = time.monotonic()
    figures = last_line(start(directory))
    assert figures["is_teacher_cached"]
    assert time.monotonic() - begin < 60
    assert [path.name for path in (directory / ".cache").iterdir()] == [next((directory / ".cache").iterdir()).name]


def test_an_interrupted_demo_leaves_no_process_and_continues(directory: Path) -> None:
    uninterrupted = last_line(start(directory))
    process = start(directory, "--output", "again")
    while steps_done(directory / "again/sft") == 0:
        assert process.poll() is None
        time.sleep(0.02)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in stderr
    assert not [pid for pid in children if psutil.pid_exists(pid)]

    figures = last_line(start(directory, "--output", "again"))
    for student in ("sft", "kd"):
        lines = (directory / "again" / student / "metrics.jsonl").read_text().splitlines()
        kinds = Counter((row["kind"], row["step"]) for row in map(json.loads, lines))
        assert set(kinds.values()) == {1}
        assert {step for kind, step in kinds if kind == "step"} == set(range(STEPS))
    assert figures["kl_kd"] == uninterrupted["kl_kd"]
    assert figures["kl_sft"] == uninterrupted["kl_sft"]


def test_the_on_policy_demo_ends_with_one_json_object_and_no_process(directory: Path) -> None:
    before = ours()
    figures = last_line(start(directory, "--on-policy"))
    assert figures["steps"] == BRIEF.student_on_policy.training.steps
    assert 0 < figures["kl_after"] < figures["kl_before"]
    assert 0 <= figures["staleness_steps_max"] <= BRIEF.student_on_policy.max_staleness
    assert figures["handle_door"] == "shm"
    assert (directory / figures["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (directory / "runs/demo-on-policy/on-policy/final/model.safetensors").is_file()
    assert ours() == before


def test_this_machines_library_is_large_enough() -> None:
    corpus = build_corpus(STANDARD.corpus)
    assert len(corpus.train) > 1000
    assert len(corpus.held_out) > STANDARD.held_out_sequences


def test_models_and_chats_are_made_for_jobs_of_ones_own_and_kept(tmp_path: Path) -> None:
    into, written = tmp_path / "models", []
    for says in (f"made {into / 'teacher'}, {into / 'student'} and {into / 'data'}", "is there already"):
        process = start(tmp_path, "--make", str(into))
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert says in stderr
        assert sorted(path.name for path in into.iterdir()) == ["data", "student", "teacher"]
        files = ("data/train.jsonl", "teacher/tokenizer.json", "student/model.safetensors")
        written.append([(into / file).stat().st_mtime_ns for file in files])
    assert written[0] == written[1]
