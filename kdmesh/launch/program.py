"""The command lines of programs that are told a configuration: services, and what the trainer's commands run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def program(module: str, config: Path, overrides: Sequence[str], *flags: str) -> tuple[str, ...]:
    """Of `python -m module`, with `flags` of its own."""
    return sys.executable, "-m", module, str(config), *set_arguments(overrides), *flags


def become(module: str, config: Path, overrides: Sequence[str], *flags: str) -> NoReturn:
    """Be that program from here on, as this process: signals reach it, and its exit code is the command's."""
    argv = program(module, config, overrides, *flags)
    os.execv(argv[0], list(argv))


def set_arguments(overrides: Sequence[str]) -> list[str]:
    """The command-line form of overrides."""
    return [argument for override in overrides for argument in ("--set", override)]
