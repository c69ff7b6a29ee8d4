"""The command line of `kdmesh precompute`: python -m kdmesh_trainer.precompute_command."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kdmesh import log
from kdmesh.config import config_parser, load
from kdmesh.errors import KdmeshError
from kdmesh_trainer.config import TrainerConfig

if TYPE_CHECKING:
    from kdmesh_trainer.precompute import Show

logger = logging.getLogger("kdmesh_trainer.precompute")

_REFUSED = 2
_INCOMPLETE = 1
_INTERRUPTED = 130
_LOG_EVERY_S = 10.0


def main() -> int:
    """Parse, check, ask.

    Returns:
        The exit status: 0 when everything is kept, 1 when the cache did not keep all of it, 2 when something was
        refused or a teacher failed, 130 when it was interrupted.
    """
    arguments = _parser().parse_args()
    try:
        cfg = load(TrainerConfig, arguments.config, arguments.set)
        log.configure("precompute")
        from kdmesh_trainer.precompute import precompute  # not at the top: a bad configuration must not wait for torch

        with _shown() as show:
            kept, wanted = precompute(cfg, is_partial=arguments.partial, tell=_tell, show=show)
    except KdmeshError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; what was computed is kept, and the same command goes on from there.\n")
        return _INTERRUPTED
    _tell(f"{kept:,} of {wanted:,} sequences are kept")
    return 0 if kept == wanted else _INCOMPLETE


def _parser() -> argparse.ArgumentParser:
    parser = config_parser("kdmesh_trainer.precompute_command", "Have the teachers of a run keep its rows.")
    parser.add_argument("--partial", action="store_true", help="keep what fits, where not all does")
    return parser


def _tell(sentence: str) -> None:
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


@contextmanager
def _shown() -> Iterator[Show]:
    """A bar on a terminal, now and then an event elsewhere."""
    if not sys.stderr.isatty():
        yield _Events().show
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("tokens [bold]{task.completed:,}[/]/{task.total:,}"), BarColumn(bar_width=24))
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=log.console()) as line:
        task = line.add_task("", total=0, left="")

        def show(done: int, total: int, left_s: float) -> None:
            minutes, seconds = divmod(round(left_s), 60)
            line.update(task, completed=done, total=total, left=f"{minutes}:{seconds:02d} left")

        yield show


class _Events:
    def __init__(self) -> None:
        self._next_s = 0.0

    def show(self, done: int, total: int, left_s: float) -> None:
        """Log it, if the last one is long enough ago."""
        if time.monotonic() >= self._next_s or done == total:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            logger.info("progress", extra={"tokens": done, "of_tokens": total, "eta_s": round(left_s, 1)})


if __name__ == "__main__":
    sys.exit(main())
