"""Ends this process when the one that started it dies, if that one asked for it."""

from __future__ import annotations

import ctypes
import os
import signal

VARIABLE = "KDMESH_DIE_WITH_PARENT"

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """With KDMESH_DIE_WITH_PARENT=1 in the environment, get SIGTERM when the parent is gone, even by SIGKILL.

    Linux counts the parent *thread* that started the process: it must live as long as the process shall.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the kernel knew of our wish
        signal.raise_signal(signal.SIGTERM)
