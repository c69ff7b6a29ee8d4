"""How every command of the trainer begins and ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from kdmesh.config import load
from kdmesh.errors import KdmeshError
from kdmesh.exit_codes import exit_code
from kdmesh.interrupt import INTERRUPTED
from kdmesh.open_files import raise_open_files
from kdmesh.outputs import say_error, say_full, tell
from kdmesh_trainer.config import TrainerConfig

_FAILED = 1


def run(
    parser: argparse.ArgumentParser,
    work: Callable[[TrainerConfig, argparse.Namespace], int],
    *,
    when_stopped: str = "",
) -> int:
    """Parse, check, and do the work.

    Args:
        parser: see `kdmesh.config.config_parser`.
        work: takes the configuration and what was parsed, and returns the exit status.
        when_stopped: what a person is told after Ctrl-C.

    Returns:
        The exit status: that of `work`, 1 when stdout is full, 2 when something was refused or a server failed, 3
        when none answered in time, 130 after Ctrl-C.
    """
    arguments = parser.parse_args()
    try:
        raise_open_files()
        return work(load(TrainerConfig, arguments.config, arguments.set), arguments)
    except KdmeshError as error:
        say_error(error)
        return exit_code(error)
    except OSError as error:
        say_full(error)
        return _FAILED
    except KeyboardInterrupt:
        if when_stopped:
            tell(when_stopped)
        return INTERRUPTED
