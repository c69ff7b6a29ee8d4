"""Shows how far a dataset has been tokenised: a live line on a terminal, now and then an event elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kdmesh.counting import clock
from kdmesh.log import can_redraw, console

T = TypeVar("T")

log = logging.getLogger(__name__)

_EVERY_S = 10.0

ShowReading = Callable[[int, int], None]
"""Is told of the bytes that have been read, and of the rows, so far."""


@contextmanager
def reading_shown(name: str, *, size_bytes: int) -> Iterator[ShowReading]:
    """What shows how far dataset `name` of so many bytes is, as long as the context lasts; on rank 0 alone."""
    if not log.isEnabledFor(logging.INFO):
        yield lambda done_bytes, rows: None
    elif can_redraw(sys.stderr):
        with _line(name, size_bytes) as show:
            yield show
    else:
        yield _Events(name, size_bytes).show


def reading_told(name: str, rows: Iterable[T]) -> Iterator[T]:
    """The rows of dataset `name`, of an unknown number; as long as they are taken, an event says how many were."""
    began_s = time.monotonic()
    next_at_s = began_s + _EVERY_S
    for number, row in enumerate(rows):
        now_s = time.monotonic()
        if now_s >= next_at_s:
            next_at_s = now_s + _EVERY_S
            pace = round(number / (now_s - began_s), 1)
            log.info("tokenising", extra={"dataset": name, "rows": number, "rows_per_second": pace})
        yield row


class _Pace:
    """Rows per second, and the time that is left."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._began_s = time.monotonic()

    def of(self, done_bytes: int, rows: int) -> tuple[float, float]:
        """(rows/s, seconds left), at the mean pace so far."""
        took_s = max(time.monotonic() - self._began_s, 1e-9)
        return rows / took_s, took_s / max(done_bytes, 1) * max(self._size_bytes - done_bytes, 0)


class _Events:
    def __init__(self, name: str, size_bytes: int) -> None:
        self._name = name
        self._size_bytes = size_bytes
        self._pace = _Pace(size_bytes)
        self._next_at_s = time.monotonic() + _EVERY_S

    def show(self, done_bytes: int, rows: int) -> None:
        """Log it, if the last one is long enough ago."""
        now_s = time.monotonic()
        if now_s < self._next_at_s:
            return
        self._next_at_s = now_s + _EVERY_S
        rows_per_second, eta_s = self._pace.of(done_bytes, rows)
        facts = {"dataset": self._name, "rows": rows, "fraction": round(done_bytes / self._size_bytes, 4)}
        log.info("tokenising", extra={**facts, "rows_per_second": round(rows_per_second, 1), "eta_s": round(eta_s, 1)})


@contextmanager
def _line(name: str, size_bytes: int) -> Iterator[ShowReading]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", style="cyan"), BarColumn(bar_width=24))
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console()) as line:
        task = line.add_task(f"tokenise {name}", total=size_bytes, figures="")
        pace = _Pace(size_bytes)

        def show(done_bytes: int, rows: int) -> None:
            rows_per_second, eta_s = pace.of(done_bytes, rows)
            figures = f"[bold]{rows:,}[/] rows   {rows_per_second:,.0f} rows/s   {clock(eta_s)} left"
            line.update(task, completed=done_bytes, figures=figures)

        yield show
