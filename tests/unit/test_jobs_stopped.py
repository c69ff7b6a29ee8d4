"""What is said of a run that was stopped, or refused while its servers load, is what became of it."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kdmesh.commands import cli
from kdmesh.launch import jobs, local
from kdmesh.preflight import check

NOTHING = "Stopped before the first step: there is nothing to save."


class Interrupted:
    """Processes of which the one rank ends as it is told when Ctrl-C comes."""

    def __init__(self, exit_code: int) -> None:
        self._rank = SimpleNamespace(exit_code=exit_code)

    def __enter__(self) -> Interrupted:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, *commands: local.Command) -> list[SimpleNamespace]:
        return [self._rank]

    def wait(self, children: object) -> None:
        raise local.Stopped(signal.SIGINT)


@pytest.mark.parametrize(
    ("exit_code", "status", "is_nothing_saved"),
    [(-signal.SIGTERM, 130, True), (130, 130, True), (-9, 130, False), (0, 0, False)],
)
def test_a_run_that_is_stopped_before_its_first_step_claims_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, status: int, is_nothing_saved: bool
) -> None:
    monkeypatch.setattr(check, "refuse_missing", lambda cfg, source: None)
    monkeypatch.setattr(local, "Processes", lambda: Interrupted(exit_code))
    path = tmp_path / "train.yaml"
    path.write_text(
        "output: run\nsteps: 10\nstudent: {model: student}\nobjective: {name: sft}\n"
        "data: {train: {format: chat, path: train.jsonl}}\n"
    )
    result = CliRunner().invoke(cli.main, ["train", str(path)])
    assert result.exit_code == status, result.output
    assert "or now if there was none yet" in result.output
    assert (NOTHING in result.output) is is_nothing_saved
    assert ("Stopped, with a checkpoint in run" in result.output) is (exit_code == 0)


def test_data_that_were_refused_just_when_the_servers_were_ready_are_refused_once() -> None:
    lines: list[str] = []
    is_told = threading.Event()

    def hear(line: str) -> None:
        lines.append(line)
        is_told.set()

    reader = "import sys, time; print('Error: a bad row', flush=True); time.sleep(0.5); sys.exit(2)"
    command = local.Command(name="reading", argv=(sys.executable, "-c", reader), on_line=hear, may_finish=True)
    with (
        local.Processes() as processes,
        pytest.raises(local.ChildFailed) as failed,
        jobs._meanwhile(processes, command, to_its_end=False),
    ):
        assert is_told.wait(10)
    assert (failed.value.exit_code, failed.value.is_told, lines) == (2, True, ["Error: a bad row"])
