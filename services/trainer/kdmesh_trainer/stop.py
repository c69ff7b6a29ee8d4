"""Turns a signal into a run that ends after its current step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdmesh_trainer.mesh import Mesh

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal's Ctrl-C reaches a rank twice at once, directly and through torchrun: that is one wish, not two.
_SAME_WISH_S = 1.0


class Stopping(Exception):
    """Raised on every rank: somebody wants the run to end, and what they do together need not be finished."""


class StopSignals:
    """Remembers the first SIGTERM or SIGINT; a second one kills this process at once.

    A context manager, on the main thread only.
    """

    def __init__(self) -> None:
        self._asked_at_s: float | None = None

    @property
    def is_asked(self) -> bool:
        """Whether this process got a signal."""
        return self._asked_at_s is not None

    def __enter__(self) -> StopSignals:
        self._previous = [signal.signal(number, self._on_signal) for number in _SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(_SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._asked_at_s is None:
            self._asked_at_s = now_s
        elif now_s - self._asked_at_s > _SAME_WISH_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class AgreedStop:
    """A stop that all ranks come to in the same step, although their signals arrive at different times."""

    def __init__(self, signals: StopSignals, mesh: Mesh) -> None:
        self._signals = signals
        self._mesh = mesh

    def is_wanted(self) -> bool:
        """True when any rank got a signal. Collective."""
        return self._mesh.is_any(self._signals.is_asked)


class NeverStop:
    """For what ends with its process."""

    def is_wanted(self) -> bool:
        """False."""
        return False


NEVER = NeverStop()
