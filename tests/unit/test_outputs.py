"""What a long command finds has a place before it begins."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kdmesh import log
from kdmesh.commands import cli, harness
from kdmesh.errors import ConfigError
from kdmesh.outputs import make_writable
from kdmesh_trainer.commands import evaluate as evaluate_command


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's directory, a trainer's configuration, a file where a directory is wanted, and a directory `full`."""
    monkeypatch.chdir(tmp_path)
    Path("student").mkdir()
    Path("full").mkdir()
    Path("student/config.json").write_text("{}")
    Path("train.jsonl").touch()
    Path("train.yaml").write_text(
        "output: run\nsteps: 10\nstudent: {model: student}\nteacher: {addresses: ['127.0.0.1:1']}\n"
        "data: {train: {format: chat, path: train.jsonl}}\n"
    )


def test_lm_eval_makes_the_directory_of_its_output_and_tells_what_it_found_first(
    at_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"results": {"parity": {"acc": 0.5}}}
    asked: list[Path] = []

    def judge(model: Path, tasks: list[str], **options: object) -> dict[str, object]:
        asked.append(model)
        return found

    monkeypatch.setattr(harness, "judge", judge)
    tables = SimpleNamespace(make_table=lambda found: "a table")
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(utils=tables))
    monkeypatch.setitem(sys.modules, "lm_eval.utils", tables)
    result = CliRunner().invoke(
        cli.main, ["lm-eval", "student", "--tasks", "parity", "--output", "train.jsonl/found.json"]
    )
    assert (result.exit_code, asked) == (2, [])
    assert "cannot write train.jsonl/found.json" in result.output
    result = CliRunner().invoke(cli.main, ["lm-eval", "student", "--tasks", "parity", "--output", "deep/er/found.json"])
    assert result.exit_code == 0, result.output
    assert json.loads(Path("deep/er/found.json").read_text()) == found

    def judge_until_the_disk_is_full(model: Path, tasks: list[str], **options: object) -> dict[str, object]:
        Path("full").rmdir()
        return found

    monkeypatch.setattr(harness, "judge", judge_until_the_disk_is_full)
    result = CliRunner().invoke(cli.main, ["lm-eval", "student", "--tasks", "parity", "--output", "full/found.json"])
    assert result.exit_code == 2
    assert "a table" in result.output
    assert "cannot write full/found.json" in result.output


def test_what_lm_eval_found_is_written_when_nobody_reads_it_or_stdout_is_full(
    at_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"results": {"parity": {"acc": 0.5}}}
    monkeypatch.setattr(harness, "judge", lambda model, tasks, **options: found)
    tables = SimpleNamespace(make_table=lambda found: "a table")
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(utils=tables))
    monkeypatch.setitem(sys.modules, "lm_eval.utils", tables)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        cli.main(["lm-eval", "student", "--tasks", "parity", "--output", "unread.json"], standalone_mode=False)
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        cli.main(["lm-eval", "student", "--tasks", "parity", "--output", "untold.json"], standalone_mode=False)
    assert [json.loads(Path(name).read_text()) for name in ("unread.json", "untold.json")] == [found, found]


def test_evaluate_refuses_an_output_that_cannot_be_written_before_it_asks(at_hand: None) -> None:
    command = [sys.executable, "-m", "kdmesh_trainer.commands.evaluate", "train.yaml", "--output"]
    done = subprocess.run([*command, "train.jsonl/o.jsonl"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot write train.jsonl/o.jsonl" in done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate", "train.yaml", "--output", "deep/er/o.jsonl"])
        patch.setattr(evaluate_command, "_evaluate", lambda cfg, answers: pytest.fail(f"{Path('deep/er').is_dir()}"))
        patch.setattr(log, "configure", lambda service: None)
        with pytest.raises(pytest.fail.Exception, match="True"):
            evaluate_command.main()


def test_no_file_that_a_command_reads_is_replaced_by_what_it_finds(at_hand: None) -> None:
    Path("asked.jsonl").write_text('{"prompt": "why", "question": "why", "answer": "so"}')
    Path("linked.jsonl").symlink_to("asked.jsonl")
    told = ["generate", "--rollout", "127.0.0.1:1", "--model", "student", "--prompts", "asked.jsonl"]
    for output in ("asked.jsonl", "linked.jsonl"):
        result = CliRunner().invoke(cli.main, [*told, "--output", output])
        assert result.exit_code == 2
        assert f"--output {output} is the file that --prompts names, which would be lost" in result.output
    command = [sys.executable, "-m", "kdmesh_trainer.commands.evaluate", "train.yaml", "--output", "asked.jsonl"]
    questions = ("evaluation.rollouts.addresses=['127.0.0.1:1']", "evaluation.questions.path=asked.jsonl")
    done = subprocess.run(
        [*command, *(word for key in questions for word in ("--set", key))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "is the file that evaluation.questions.path names" in done.stderr
    assert "why" in Path("asked.jsonl").read_text()


def test_an_output_that_holds_something_is_replaced_only_when_that_is_wanted(at_hand: None) -> None:
    Path("asked.jsonl").write_text('{"prompt": "why"}')
    Path("found.jsonl").write_text("mine")
    told = ["generate", "--rollout", "127.0.0.1:1", "--model", "student", "--prompts", "asked.jsonl"]
    result = CliRunner().invoke(cli.main, [*told, "--output", "found.jsonl"])
    assert result.exit_code == 2
    assert "--output found.jsonl is there already, and would be lost: give another, or --overwrite" in result.output
    result = CliRunner().invoke(cli.main, [*told, "--output", "found.jsonl", "--overwrite"])
    assert "student has no tokenizer" in result.output
    command = [sys.executable, "-m", "kdmesh_trainer.commands.evaluate", "train.yaml", "--output", "found.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "--overwrite" in done.stderr) == (2, True), done.stderr
    assert Path("found.jsonl").read_text() == "mine"


def test_what_is_there_already_is_untouched(tmp_path: Path) -> None:
    for name in ("found.json", "found.json.part"):
        (tmp_path / name).write_text("mine")
    make_writable(tmp_path / "found.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.json.part"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}
    with pytest.raises(ConfigError, match="cannot write"):
        make_writable(tmp_path)


def test_a_command_goes_on_when_nobody_reads_what_it_says_any_more(tmp_path: Path) -> None:
    script = f"""
import pathlib, sys
from kdmesh.outputs import say
sys.stdin.readline()
for _ in range(3):
    say("figures" * 100_000)
pathlib.Path({str(tmp_path / "done")!r}).touch()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")
    assert (tmp_path / "done").exists()


_LOGGED = """
import logging, threading
from kdmesh import log
log.configure_command("generate")
thread = threading.Thread(target=lambda: print(logging.getLogger("kdmesh").warning("a"), end=", "))
thread.start()
thread.join()
logging.getLogger("kdmesh").warning("b")
print("goes on")
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("from kdmesh.outputs import tell; tell('a'); tell('b'); print('goes on')", "goes on\n"),
        ("from kdmesh.counting import told; told('rows')(1, 2, None); print('goes on')", "goes on\n"),
        (_LOGGED, "None, goes on\n"),
    ],
)
def test_a_command_goes_on_when_nobody_reads_what_it_tells(script: str, said: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=writer, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stdout) == (0, said)


_TRAINERS_COMMAND = """
import sys
from kdmesh.config import config_parser
from kdmesh.outputs import say
from kdmesh_trainer.commands.running import run
sys.exit(run(config_parser("figures", "Say figures."), lambda *_: say("figures") or 0))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["from kdmesh.entry import main; main()", "schema", "trainer"],
        ["from kdmesh.entry import main; main()", "--version"],
        [_TRAINERS_COMMAND, "train.yaml"],
    ],
)
def test_a_full_disk_behind_stdout_is_told_in_a_line(at_hand: None, command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", *command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: nothing more can be written: No space left on device\n")
