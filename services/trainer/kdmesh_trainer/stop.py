"""Turns a signal into a run that ends after its current step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from kdmesh.errors import KdmeshError, RpcError

if TYPE_CHECKING:
    from kdmesh_trainer.mesh import Mesh

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal's Ctrl-C reaches a rank twice at once, directly and through torchrun: that is one wish, not two.
_SAME_WISH_S = 1.0
# Who stops this run may have stopped its servers with it; and 30 s after the signal many would kill it.
_PATIENCE_S = 15.0
_LOOK_EVERY_S = 0.2


class Stopping(Exception):
    """Raised on every rank: somebody wants the run to end, and what they do together need not be finished."""


class StepLost(KdmeshError):
    """Raised on every rank: what one of them waited for does not come, so what they do together is left undone."""


@contextmanager
def losing_the_step() -> Iterator[None]:
    """What a service fails in inside, on every rank, costs them the step."""
    try:
        yield
    except RpcError as error:
        raise StepLost(str(error)) from error


class StopSignals:
    """Remembers the first SIGTERM or SIGINT; a second one kills this process at once.

    What is still waited for when patience ends is given up. A context manager, on the main thread only.
    """

    def __init__(self, *, patience_s: float = _PATIENCE_S) -> None:
        self._asked_at_s: float | None = None
        self._patience_s = patience_s
        self._waits: list[Callable[[], None]] = []
        self._is_over = threading.Event()
        self._clock = threading.Thread(target=self._watch, name="kdmesh patience", daemon=True)

    def at_last(self, give_up: Callable[[], None]) -> None:
        """Have this called in another thread, again and again, from `patience_s` after a signal on."""
        self._waits.append(give_up)

    def give_nothing_up(self) -> None:
        """From now on. Blocks, shortly: what is being given up is given up before."""
        self._is_over.set()
        self._clock.join()

    @property
    def is_asked(self) -> bool:
        """Whether this process got a signal."""
        return self._asked_at_s is not None

    def __enter__(self) -> StopSignals:
        self._previous = [signal.signal(number, self._on_signal) for number in _SIGNALS]
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_nothing_up()
        for number, handler in zip(_SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)

    def _watch(self) -> None:
        # It looks, and is not told: a signal may come while its thread holds the lock of whatever would tell.
        while not self._is_over.wait(_LOOK_EVERY_S):
            if self._asked_at_s is not None and time.monotonic() - self._asked_at_s >= self._patience_s:
                for give_up in self._waits:
                    give_up()

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

    def has_come_too_late(self) -> None:
        """See RunStop."""
        self._signals.give_nothing_up()


class NeverStop:
    """For what ends with its process."""

    def is_wanted(self) -> bool:
        """False."""
        return False


NEVER = NeverStop()
