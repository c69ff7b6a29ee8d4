"""Ctrl-C while a command imports what it needs: the process ends, without a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

INTERRUPTED = 130
"""Exit code of every kdmesh process that Ctrl-C ended before there was anything to save."""


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Around imports: Ctrl-C ends the process at once, unless somebody has decided otherwise."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
