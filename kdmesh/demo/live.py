"""Shows a person what the demo is doing while it does it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn

from kdmesh.counting import clock
from kdmesh.demo.record import Record, read_record, teacher_wait_fraction, tokens_per_second
from kdmesh.log import can_redraw, console

_LOOK_S = 0.5
_LINE_EVERY_S = 10.0


class Live:
    """Permanent lines, and below them one live line while a run is followed.

    Where there is no terminal that can redraw a line, the live line becomes a permanent one every ten seconds.
    """

    def __init__(self) -> None:
        self._console = console()
        self._begun_s = time.monotonic()

    def say(self, text: str) -> None:
        """A permanent line, after the time since the beginning. Rich markup."""
        self._console.print(f"[dim]{clock(int(time.monotonic() - self._begun_s))}[/]  {text}")

    @contextmanager
    def following(self, label: str, metrics: Path, *, steps: int) -> Iterator[None]:
        """Show what is written to `metrics` until the block ends."""
        ended = threading.Event()
        show = self._on_one_line if can_redraw(sys.stderr) else self._line_by_line
        thread = threading.Thread(target=show, args=(label, metrics, steps, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _on_one_line(self, label: str, metrics: Path, steps: int, ended: threading.Event) -> None:
        columns = (
            TextColumn("      [cyan]{task.description}[/]"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as line:
            task = line.add_task(label, total=steps, figures="starting")
            while not ended.wait(_LOOK_S):
                record = read_record(metrics)
                if record.steps:
                    line.update(task, completed=record.done, figures=figures(record, steps=steps))

    def _line_by_line(self, label: str, metrics: Path, steps: int, ended: threading.Event) -> None:
        shown = 0
        while not ended.wait(_LINE_EVERY_S):
            record = read_record(metrics)
            if record.done > shown:
                shown = record.done
                self.say(f"{label}: {figures(record, steps=steps)}")


def figures(record: Record, *, steps: int) -> str:
    """Step, loss, tokens per second, teacher wait and time left of a record that has a step. Rich markup."""
    recent = record.recent()
    parts = [
        f"step [bold]{record.done}[/]/{steps}",
        f"loss [bold]{recent[-1].loss_nats_per_token:.3f}[/]",
        f"{tokens_per_second(recent):,.0f} tokens/s",
    ]
    if recent[-1].door:
        parts.append(f"teacher wait {teacher_wait_fraction(recent):.0%}")
    if len(recent) > 1:
        pace_s = (recent[-1].time - recent[0].time) / (len(recent) - 1)
        parts.append(f"{clock(pace_s * (steps - record.done))} left")
    return "   ".join(parts)
