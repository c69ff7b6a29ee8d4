"""Holds what the log promises: events with fields, as JSON lines or for a person."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from kdmesh import log


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    log.console.cache_clear()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_one_json_object_with_the_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("trainer", rank=0, pretty=False)
    logging.getLogger("kdmesh.some").info("step done", extra={"step": 120, "loss_nats_per_token": 0.41})
    (line,) = lines(capsys)
    assert line.pop("time")
    assert line == {
        "level": "info",
        "event": "step done",
        "service": "trainer",
        "rank": 0,
        "logger": "kdmesh.some",
        "step": 120,
        "loss_nats_per_token": 0.41,
    }


def test_values_without_a_json_form_are_written_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("trainer", pretty=False)
    logging.getLogger("kdmesh").warning("odd", extra={"loss": float("nan"), "path": sys.path.__class__})
    (line,) = lines(capsys)
    assert line["loss"] == "nan"
    assert line["path"] == "<class 'list'>"


def test_an_exception_stays_on_the_line_of_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("teacher", pretty=False)
    try:
        raise ValueError("seven")
    except ValueError:
        logging.getLogger("kdmesh").exception("request failed")
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "ValueError: seven" in str(line["exception"])


def test_other_ranks_and_libraries_speak_only_from_warning(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("trainer", rank=3, pretty=False)
    logging.getLogger("kdmesh_trainer.loop").info("step done")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("kdmesh_trainer.loop").warning("slow step")
    assert [(line["event"], line["rank"]) for line in lines(capsys)] == [("slow step", 3)]


def test_what_all_ranks_wait_for_is_said_by_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (3, 0):
        log.configure("trainer", rank=rank, pretty=False)
        logging.getLogger("kdmesh.rpc.fleet.told_waiting").warning("waiting for a server")
    assert [line["rank"] for line in lines(capsys)] == [0]


def test_configuring_twice_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("trainer", pretty=False)
    log.configure("trainer", pretty=False)
    logging.getLogger("kdmesh").info("once")
    assert len(lines(capsys)) == 1


def test_a_terminal_gets_the_same_event_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    log.configure("trainer")
    logging.getLogger("kdmesh").info("step done", extra={"step": 7, "loss": 0.123456})
    shown = terminal.getvalue()
    assert "step done" in shown
    assert "0.1235" in shown
    assert "{" not in shown


def test_a_terminal_shows_once_what_comes_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(log, "console", lambda: Console(file=terminal, width=200, color_system=None))
    log.configure("trainer", pretty=True)
    ours = logging.getLogger("kdmesh_trainer")
    for step in range(3):
        for address in ("a:1", "b:1"):
            ours.info("weights on their way", extra={"address": address, "door": "shm" if step < 2 else "inline"})
        ours.info("weights published", extra={"steps_done": step, "weight_version": step + 1})
        ours.info("checkpoint written", extra={"step": step})
    shown = terminal.getvalue()
    assert [shown.count(event) for event in ("weights on", "weights published", "checkpoint written")] == [4, 1, 3]


@pytest.mark.parametrize(
    ("is_terminal", "term", "can"),
    [(True, "xterm", True), (True, "dumb", False), (True, "unknown", False), (False, "xterm", False)],
)
def test_a_line_is_drawn_again_only_where_that_shows(
    is_terminal: bool, term: str, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("TERM", term)
    assert log.can_redraw(stream) is can


@pytest.mark.parametrize(
    ("line", "is_urgent"),
    [
        ('{"level": "info", "event": "ready"}', False),
        ('{"level": "warning", "event": "slow"}', True),
        ("Traceback (most recent call last):", True),
        ("17", True),
    ],
)
def test_a_services_warnings_reach_the_terminal_and_its_chatter_does_not(line: str, is_urgent: bool) -> None:
    assert log.is_urgent(line) is is_urgent
