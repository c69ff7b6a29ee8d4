"""Configures logging: one JSON object per line, or the same events rendered for a person on a terminal."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

from kdmesh.outputs import lead_nowhere
from kdmesh.tracing import spans

if TYPE_CHECKING:
    from rich.console import Console

# What every record carries; anything else on a record came from `extra`.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_DUMB = ("dumb", "unknown")  # rich's own list: it draws nothing live there, and says nothing of it
_OURS = ("kdmesh", "kdmesh_teacher", "kdmesh_rollout", "kdmesh_trainer")
_ALIKE = ("kdmesh.rpc.fleet.told_waiting",)  # whose warnings all ranks have at the same time
_OF_EVERY_STEP = {"weights on their way": ("address", "door"), "weights published": ()}
"""Event -> fields: a terminal, which has a live line, shows it once for each value of these."""


def configure(service: str, *, rank: int = 0, pretty: bool | None = None) -> None:
    """Send this process's log to stderr. Called once, by `main`; modules only take loggers.

    Our own loggers speak from INFO on rank 0 and from WARNING on the others, libraries from WARNING. What all ranks
    would say alike, rank 0 says.

    Args:
        service: the `service` field of every line.
        rank: the `rank` field of every line.
        pretty: True renders for a person, False writes JSON; None decides by whether stderr is a terminal.
    """
    if pretty is None:
        pretty = sys.stderr.isatty()
    handler: logging.Handler = _ConsoleHandler() if pretty else logging.StreamHandler(sys.stderr)
    if not pretty:
        handler.setFormatter(JsonFormatter(service, rank))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in _ALIKE:
        logging.getLogger(name).setLevel(logging.NOTSET if rank == 0 else logging.ERROR)
    logging.captureWarnings(True)


def configure_command(name: str) -> None:
    """Show warnings to the person who runs a command; a process that has set up its logging keeps that."""
    if not logging.getLogger().handlers:
        configure(name, pretty=True)
        for ours in _OURS:
            logging.getLogger(ours).setLevel(logging.WARNING)


@functools.cache
def console() -> Console:
    """The terminal that log lines are rendered on; a live display must share it to keep its own line intact."""
    from rich.console import Console  # a tenth of a second, needed on terminals only

    class Stderr(Console):
        """Goes on when nobody reads it any more, where rich ends the process, or the one thread that logs."""

        def on_broken_pipe(self) -> None:
            lead_nowhere(sys.stderr)

    return Stderr(stderr=True, highlight=False, soft_wrap=True)


def can_redraw(stream: TextIO) -> bool:
    """Whether a line that is written to `stream` can be drawn again: it is a terminal, and no dumb one."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in _DUMB


def is_urgent(line: str) -> bool:
    """Whether a line of a service's output needs a person: a warning, an error, or no event at all."""
    try:
        return bool(json.loads(line)["level"] not in ("info", "debug"))
    except (ValueError, TypeError, KeyError):
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, event, service, rank, then the fields of `extra`."""

    def __init__(self, service: str, rank: int) -> None:
        super().__init__()
        self._service = service
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "service": self._service,
            "rank": self._rank,
            "logger": record.name,
        }
        line.update(spans.log_fields())
        line.update({name: _plain(value) for name, value in _fields(record).items()})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, allow_nan=False)


class _ConsoleHandler(logging.Handler):
    """Time, event and fields on one line; colour says the level."""

    _STYLES = ((logging.ERROR, "bold red"), (logging.WARNING, "yellow"), (0, "default"))

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[tuple[object, ...]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Not what comes with every step, once it was shown."""
        fields = _OF_EVERY_STEP.get(record.msg)
        if fields is not None:
            told = (record.msg, *(record.__dict__[name] for name in fields))
            if told in self._shown:
                return False
            self._shown.add(told)
        return bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record on the shared terminal."""
        from rich.text import Text

        style = next(style for level, style in self._STYLES if record.levelno >= level)
        line = Text()
        line.append(time.strftime("%H:%M:%S ", time.localtime(record.created)), style="dim")
        line.append(record.getMessage(), style=style)
        for name, value in _fields(record).items():
            line.append(f"  {name}=", style="dim")
            line.append(_short(value) if isinstance(value, float) else str(value))
        if record.exc_info:
            line.append("\n" + logging.Formatter().formatException(record.exc_info))
        try:
            console().print(line)
        except OSError:  # the terminal is gone, or a disk is full
            lead_nowhere(sys.stderr)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _plain(value: object) -> object:
    """JSON has no infinities and no NaN: they are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
