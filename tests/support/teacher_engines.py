"""Fake engines that stop, fail or lie when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kdmesh_teacher.config import FakeEngine as FakeEngineConfig
from kdmesh_teacher.engine import PrefillJob
from kdmesh_teacher.fake_engine import FakeEngine


class ControlledEngine(FakeEngine):
    """A fake engine whose next batches can be held back or made to fail."""

    def __init__(self, config: FakeEngineConfig) -> None:
        super().__init__(config)
        self._open = threading.Event()
        self._open.set()
        self._entered = threading.Semaphore(0)
        self.failures: list[Exception] = []
        """Raised by the next prefills, one each."""

        self.batches: list[int] = []
        """Number of jobs of every prefill."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """As the fake engine, when the test lets it."""
        self.batches.append(len(jobs))
        self._entered.release()
        assert self._open.wait(30)
        if self.failures:
            raise self.failures.pop(0)
        super().prefill(jobs)

    def hold(self) -> None:
        """From now on no prefill returns."""
        while self._entered.acquire(blocking=False):
            pass
        self._open.clear()

    def wait_entered(self) -> None:
        """Return when a prefill has begun since `hold`. Blocks."""
        assert self._entered.acquire(timeout=30)

    def let_go(self) -> None:
        """Let held prefills return."""
        self._open.set()
