"""What SIGTERM does to a command that has something to put in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kdmesh.launch.local import Stopped


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM ends what is under way as Ctrl-C does: everything is put in order first."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
