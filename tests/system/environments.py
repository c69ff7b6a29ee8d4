"""What answers a student in jobs of tests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def by_length(messages: Messages, row: Mapping[str, Any], *, every: int) -> list[dict[str, str]] | None:
    """Ends an episode by what the student has said; else tells it how long that was, and the row's level."""
    letters = len(messages[-1]["content"])
    return None if letters % every == 0 else [{"role": "user", "content": f"{letters} at level {row['level']}"}]


def that_waits(messages: Messages, row: Mapping[str, Any], *, every: int, flag: str) -> list[dict[str, str]] | None:
    """As by_length, but says that it is asked, and waits, while there is a file at `flag`."""
    while Path(flag).exists():
        Path(flag).with_suffix(".asked").touch()
        time.sleep(0.05)
    return by_length(messages, row, every=every)


def endless(messages: Messages, row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Always asks for more."""
    return [{"role": "user", "content": "and then?"}]


def failing(messages: Messages, row: Mapping[str, Any]) -> None:
    """Knows no answer."""
    raise LookupError(f"level {row['level']}")


def by_turns(response: str, row: Mapping[str, Any], is_cut_off: bool, messages: Messages) -> float:
    """A judge: an episode weighs by its turns, whose last one is the response."""
    assert messages[-1] == {"role": "assistant", "content": response}
    return 1 / sum(message["role"] == "assistant" for message in messages)
