"""Fake rollout engines that stop or fail when a test says so."""

from __future__ import annotations

import threading

from kdmesh_rollout.config import FakeEngine as FakeEngineConfig
from kdmesh_rollout.engine import Finished
from kdmesh_rollout.fake_engine import FakeEngine


class ControlledEngine(FakeEngine):
    """A fake engine whose next steps can be held back, allowed one by one, or made to fail."""

    def __init__(self, config: FakeEngineConfig) -> None:
        super().__init__(config)
        self._is_held = False
        self._permits = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self.failures: list[Exception] = []
        """Raised by the next steps, one each."""

        self.steps: list[int] = []
        """Number of samples of every step."""

    def step(self) -> list[Finished]:
        """As the fake engine, when the test lets it."""
        self.steps.append(self.num_running)
        self._entered.release()
        if self._is_held:
            assert self._permits.acquire(timeout=30)
        if self.failures:
            raise self.failures.pop(0)
        return super().step()

    def hold(self) -> None:
        """From now on no step returns that `allow` has not allowed."""
        while self._entered.acquire(blocking=False):
            pass
        self._is_held = True

    def wait_entered(self) -> None:
        """Return when a step has begun since `hold`, or since the last call of this. Blocks."""
        assert self._entered.acquire(timeout=30)

    def allow(self, steps: int) -> None:
        """Let so many held steps return."""
        self._permits.release(steps)

    def let_go(self) -> None:
        """Let all steps return."""
        self._is_held = False
        self._permits.release(1)
