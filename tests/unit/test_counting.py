"""How far a long command is, is seen on every kind of terminal and where there is none."""

from __future__ import annotations

import io
import sys

import pytest

from kdmesh import counting


@pytest.mark.parametrize("term", ["dumb", None])
def test_where_nothing_can_be_redrawn_it_is_told_now_and_then(
    term: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(counting.time, "monotonic", lambda: now_s)
    stream = io.StringIO()
    if term is not None:
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", stream)
    told: list[tuple[int, float | None]] = []
    with counting.counted("prompts", elsewhere=lambda done, total, left_s: told.append((done, left_s))) as show:
        pace = counting.Pace(done=10, total=70)
        for done in range(11, 71):
            now_s += 1
            show(done, 70, pace.left_s(done))
    assert told == [(done, 70 - done) for done in range(20, 71, 10)]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with counting.counted("prompts", elsewhere=lambda *figures: pytest.fail("there is a terminal")) as show:
        show(1_000, 2_000, None)
        show(1_500, 2_000, 61)
    assert "1,500" in stream.getvalue()
    assert "1:01 left" in stream.getvalue()
