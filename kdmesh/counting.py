"""Shows how many of something are done: a bar on a terminal, now and then a word elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kdmesh import log, outputs

_EVERY_S = 10.0

Show = Callable[[int, int, float | None], None]
"""Is told of how many are done, how many there are, and seconds left; None while nobody can know."""


@contextmanager
def counted(unit: str, *, elsewhere: Show) -> Iterator[Show]:
    """What shows that so many `unit` are done, as long as the context lasts.

    Args:
        elsewhere: is told every ten seconds where there is no terminal to draw on.
    """
    if not log.can_redraw(sys.stderr):
        yield _Seldom(elsewhere).show
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn(f"{unit} [bold]{{task.completed:,}}[/]/{{task.total:,}}"), BarColumn(bar_width=24))
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=log.console()) as line:
        task = line.add_task("", total=0, left="")

        def show(done: int, total: int, left_s: float | None) -> None:
            line.update(task, completed=done, total=total, left="" if left_s is None else f"{clock(left_s)} left")

        yield show


def told(what: str) -> Show:
    """What says on stderr how many of `what` are done, for `elsewhere`."""

    def tell(done: int, total: int, left_s: float | None) -> None:
        outputs.tell(f"{done:,} of {total:,} {what}" + ("" if left_s is None else f", {clock(left_s)} left"))

    return tell


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Pace:
    """Seconds left, at the mean pace since it was made."""

    def __init__(self, *, done: int, total: int) -> None:
        self._begun, self._total = done, total
        self._began_s = time.monotonic()

    def left_s(self, done: int) -> float:
        """When so many are done."""
        return (time.monotonic() - self._began_s) / max(done - self._begun, 1) * (self._total - done)


class _Seldom:
    def __init__(self, tell: Show) -> None:
        self._tell = tell
        self._next_s = time.monotonic() + _EVERY_S

    def show(self, done: int, total: int, left_s: float | None) -> None:
        """Tell, if the last time is long enough ago."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            self._tell(done, total, left_s)
