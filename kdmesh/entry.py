"""Where the `kdmesh` command begins."""

from __future__ import annotations

import os
import sys

from kdmesh.interrupt import quiet_interrupt


def main() -> None:
    """The command; what it consists of is imported only now."""
    with quiet_interrupt():
        _open_closed_streams()
        from kdmesh.commands.cli import main as command
        from kdmesh.outputs import say_full
    try:
        command()
    except OSError as error:
        say_full(error)
        sys.exit(1)


def _open_closed_streams() -> None:
    """Lead standard streams nowhere that this process was started without; else other files would get their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, which is this
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
