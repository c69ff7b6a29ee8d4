"""Replaces itself with a command that gets a signal when its parent dies, however the parent dies.

Run by path under `python -I -S`, with nothing imported from kdmesh, so that it costs a few milliseconds:
`tether.py PARENT_PID SIGNAL COMMAND...`. Linux keeps the setting across exec; `preexec_fn` could do the same
but is not safe in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become argv[3:]; exit with 1 when the parent is already gone."""
    parent, death_signal, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal)
    # The parent may have died before the call above; then no signal would ever come.
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
