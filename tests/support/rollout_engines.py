"""Fake rollout engines that stop or fail when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kdmesh.errors import EngineFailure
from kdmesh.serving.engine.revival import RestartLimits
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


class MortalEngine(ControlledEngine):
    """A `ProcessEngine` whose process dies when a test says so; there is none in truth."""

    def __init__(self, config: FakeEngineConfig) -> None:
        super().__init__(config)
        self.num_starts = 1
        self._fake_config = config
        self._reason: str | None = None
        self._on_death: Callable[[str], None] = lambda reason: None

    @property
    def restart_limits(self) -> RestartLimits:
        return RestartLimits(restarts=1, window_s=60)

    def step(self) -> list[Finished]:
        finished = super().step()
        if self._reason is not None:
            raise EngineFailure(self._reason)
        return finished

    def commit(self, version: int) -> None:
        assert self._reason is None
        super().commit(version)

    def kill(self) -> None:
        """Its process dies; a step that is held fails when it is let go."""
        self._reason = f"process {self.num_starts} died"
        self._on_death(self._reason)

    def restart(self) -> None:
        self.num_starts += 1
        self._reason = None
        FakeEngine.__init__(self, self._fake_config)
        self.load()

    def watch(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death

    def close(self) -> None:
        pass
