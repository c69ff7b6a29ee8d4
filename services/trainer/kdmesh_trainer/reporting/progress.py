"""Shows how far a run is: a live line on a terminal, now and then an event elsewhere."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Protocol

from kdmesh.counting import clock
from kdmesh.log import console

log = logging.getLogger(__name__)

_WIDE = 160
"""Columns of a terminal that has room for a bar beside the longest figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a person wants to see of a step; rates are over the last few steps."""

    done: int
    loss_nats_per_token: float
    tokens_per_second: float
    teacher_wait_fraction: float
    sampling_wait_fraction: float | None = None  # None: nothing is sampled
    response_tokens_mean: float | None = None
    bounded_by: str | None = None  # the phase that took most of the last step


class Progress(Protocol):
    """Something that shows readings."""

    def start(self, first_step: int, steps: int) -> None:
        """The run goes from `first_step` to `steps`."""
        ...

    def phase(self, name: str) -> None:
        """The run does this now."""
        ...

    def show(self, reading: Reading) -> None:
        """A step is done."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


class LogProgress:
    """An event with the reading's fields after the first step, the last, and every `every_s` seconds between."""

    def __init__(self, *, every_s: float) -> None:
        self._every_s = every_s
        self._next_at_s = 0.0
        self._pace = _Pace()

    def start(self, first_step: int, steps: int) -> None:
        """Begin."""
        self._pace.start(first_step, steps)

    def phase(self, name: str) -> None:
        """Not worth an event."""

    def show(self, reading: Reading) -> None:
        """Log it, if the last one is long enough ago."""
        now_s = time.monotonic()
        if now_s < self._next_at_s and reading.done < self._pace.steps:
            return
        self._next_at_s = now_s + self._every_s
        eta_s = round(self._pace.eta_s(reading.done), 1)
        known = {name: value for name, value in asdict(reading).items() if value is not None}
        log.info("progress", extra={"steps": self._pace.steps, **known, "eta_s": eta_s})

    def close(self) -> None:
        """Nothing to end."""


class TerminalProgress:
    """One live line: step, loss, time left, tokens per second, waits, what takes most of a step.

    A narrow terminal shows as many of them as it has room for, and no bar.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._pace = _Pace()
        terminal = console()
        texts = (
            "[cyan]{task.fields[phase]:<10}[/] step [bold]{task.completed}[/]/{task.total}",
            "{task.fields[figures]}",
        )
        if terminal.width < _WIDE:  # rich shortens all columns alike, so that the step would go first
            self._line = Progress(TextColumn("  ".join(texts)), console=terminal)
        else:
            self._line = Progress(TextColumn(texts[0]), BarColumn(bar_width=24), TextColumn(texts[1]), console=terminal)
        self._task = self._line.add_task("", phase="starting", figures="", start=False)

    def start(self, first_step: int, steps: int) -> None:
        """Draw the line."""
        self._pace.start(first_step, steps)
        self._line.update(self._task, total=steps, completed=first_step)
        self._line.start_task(self._task)
        self._line.start()

    def phase(self, name: str) -> None:
        """Name what is going on; batch, update and publish alternate too fast to read."""
        self._line.update(self._task, phase="train" if name in ("batch", "update", "publish") else name)

    def show(self, reading: Reading) -> None:
        """Redraw the line."""
        figures = (
            f"loss [bold]{reading.loss_nats_per_token:.4f}[/]   {clock(self._pace.eta_s(reading.done))} left   "
            f"{reading.tokens_per_second:,.0f} tokens/s   bounded by {reading.bounded_by}   "
            f"teacher wait {reading.teacher_wait_fraction:.0%}{_sampling(reading)}"
        )
        self._line.update(self._task, completed=reading.done, figures=figures)

    def close(self) -> None:
        """Leave the line as it is."""
        self._line.stop()


def _sampling(reading: Reading) -> str:
    if reading.sampling_wait_fraction is None or reading.response_tokens_mean is None:
        return ""
    return (
        f"   sampling wait {reading.sampling_wait_fraction:.0%}   {reading.response_tokens_mean:,.0f} tokens/response"
    )


class _Pace:
    """Time left, from the mean pace since the run's second step; the first one pays for warm-up."""

    def __init__(self) -> None:
        self.steps = 0
        self._from: tuple[int, float] | None = None

    def start(self, first_step: int, steps: int) -> None:
        self.steps = steps
        self._begun_s = time.monotonic()
        self._first_step = first_step

    def eta_s(self, done: int) -> float:
        now_s = time.monotonic()
        if self._from is None:
            self._from = (done, now_s)
            return (now_s - self._begun_s) / max(1, done - self._first_step) * (self.steps - done)
        since, at_s = self._from
        return (now_s - at_s) / max(1, done - since) * (self.steps - done)
