"""The files of docs/extending.md train a student, as they stand there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import ROOT, Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.training import KDMESH

PAGE = ROOT / "docs" / "extending.md"
# A line with a file's name, then its text.
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory with the files of the page."""
    path = tmp_path_factory.mktemp("extending")
    for name, text in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def on_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the page can be imported."""
    monkeypatch.syspath_prepend(directory)
    yield
    for name in [file.stem for file in directory.glob("*.py")]:
        sys.modules.pop(name, None)


def run(processes: Processes, directory: Path, *arguments: str) -> Process:
    """`kdmesh` in the user's directory, by a Python that does not look there by itself."""
    return processes.start("kdmesh", directory, KDMESH, *arguments, PYTHONPATH="", PYTHONSAFEPATH="1")


def test_page_names_every_file_that_it_shows(directory: Path) -> None:
    names = {"my.yaml", "my_losses.py", "test_my_losses.py", "my_algorithm.py", "my_data.py", "questions.csv"}
    names |= {"my_judge.py", "judged.yaml", "calculator.py", "answered.yaml"}
    assert {file.name for file in directory.iterdir()} == names
    assert PAGE.read_text(encoding="utf-8").count("\n```") == 2 * len(names) + 2  # and the two commands


def test_the_environment_of_the_page_is_that_of_the_example(directory: Path, on_path: None) -> None:
    shown, example = directory / "calculator.py", ROOT / "examples" / "calculator.py"
    assert shown.read_text(encoding="utf-8") == example.read_text(encoding="utf-8")
    respond = import_module("calculator").respond
    said = {
        "so calc(2 + 3) and calc(17 * (23 - 1) / 4)": "93.5",
        "calc(-1/3)": "-0.333",
        "calc(1/0)": "not an expression: ZeroDivisionError",
        "calc(2**9)": "not an expression: ValueError",
        "calc(()": "not an expression: SyntaxError",
        f"calc({'(' * 500}1{')' * 500})": "not an expression: ",
        f"calc({'9' * 5000}*2)": "not an expression: ",
    }
    for text, value in said.items():
        [answer] = respond([{"role": "assistant", "content": text}], {}, digits=3)
        assert answer["role"] == "user"
        assert answer["content"].startswith(value), text
    assert respond([{"role": "assistant", "content": "it is 94"}], {}) is None


def test_tests_of_the_page_pass(directory: Path, on_path: None) -> None:
    tests = [value for name, value in vars(import_module("test_my_losses")).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_files_of_the_page_train_a_student(
    directory: Path, materials: Materials, undisturbed: Undisturbed, processes: Processes
) -> None:
    models = ["--set", f"student.model={materials.plain.student}"]
    check = run(processes, directory, "check", "my.yaml", *models)
    training = run(
        processes,
        directory,
        "train",
        "my.yaml",
        *models,
        *("--set", f"teacher.addresses=['{undisturbed.teacher.address}']", "--set", "steps=3"),
    )
    check.succeed()
    training.succeed()
    (read,) = training.events("dataset read")
    assert (read["rows"], read["sequences"]) == (6, 6)
    assert (directory / "runs" / "mine" / "final" / "config.json").is_file()
    text = (directory / "runs" / "mine" / "metrics.jsonl").read_text()
    assert text.count('"kind": "step"') == 3
    (checkpoint,) = (directory / "runs" / "mine" / "checkpoints").glob("step-*")
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert {name for name in saved if "algorithm" in name} == {
        "model.algorithm.projector.weight",
        *(f"optimizer.algorithm.projector.weight.{moment}" for moment in ("exp_avg", "exp_avg_sq", "step")),
    }


@pytest.mark.parametrize("config", ["judged", "answered"])
def test_the_judge_of_the_page_weighs_samples_and_its_environment_answers_them(
    config: str,
    directory: Path,
    materials: Materials,
    undisturbed: Undisturbed,
    processes: Processes,
    tmp_path: Path,
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    rollouts.start()
    models = ["--set", f"student.model={materials.plain.student}"]
    check = run(processes, directory, "check", f"{config}.yaml", *models)
    training = run(
        processes,
        directory,
        "train",
        f"{config}.yaml",
        *models,
        *("--set", f"teacher.addresses=['{undisturbed.teacher.address}']", "--set", "steps=2"),
        *("--set", f"source.rollouts.addresses=['{rollouts.address}']", "--set", "source.sampling.max_new_tokens=8"),
        *("--set", "data.max_tokens=128", "--set", "batch.max_tokens=128"),
    )
    check.succeed()
    training.succeed()
    lines = [json.loads(line) for line in (directory / "runs" / config / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 2
    for step in steps:
        if config == "judged":
            assert (step["judge_errors"], step["left_out_fraction"]) == (0, 0)
            assert 0.1 <= step["sample_weight_mean"] <= 1
        else:
            assert step["episode_turns_mean"] >= 1
            assert step["ended_by_environment_fraction"] + step["ended_by_length_fraction"] == 1
