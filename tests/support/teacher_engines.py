"""Fake engines that stop, fail or lie when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Set

from kdmesh.errors import EngineFailure, KdmeshError
from kdmesh.handles.slab.memory import Segment
from kdmesh.serving.engine.revival import RestartLimits
from kdmesh.types import SleepTag
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

        self.offsets: list[int] = []
        """Where in its segment each job's rows begin."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """As the fake engine, when the test lets it."""
        self.batches.append(len(jobs))
        self.offsets += [job.offset_bytes for job in jobs]
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


class MortalEngine(ControlledEngine):
    """A `ProcessEngine` whose process dies when a test says so; there is none in truth.

    Attributes:
        births: failures of the next starts of its process, None for one that succeeds; then all succeed.
        num_starts: of its process.
        asleep: tags that its process has given back.
    """

    def __init__(self, config: FakeEngineConfig, limits: RestartLimits) -> None:
        super().__init__(config)
        self.births: list[KdmeshError | None] = []
        self.num_starts = 1
        self.asleep: set[SleepTag] = set()
        self._limits = limits
        self._mapped: set[int] = set()
        self._reason: str | None = None
        self._on_death: Callable[[str], None] = lambda reason: None
        self._may_start = threading.Event()
        self._may_start.set()

    @property
    def restart_limits(self) -> RestartLimits:
        return self._limits

    def hold_starts(self) -> None:
        """From now on its process does not start until `let_start`."""
        self._may_start.clear()

    def let_start(self) -> None:
        """Let held starts go on."""
        self._may_start.set()

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        super().prefill(jobs)
        if self._reason is not None:
            raise EngineFailure(self._reason)
        for job in jobs:
            assert job.segment is None or job.segment in self._mapped, "memory of a process that is dead"

    def kill(self) -> None:
        """Its process dies; a prefill that is held fails when it is let go."""
        self._reason = f"process {self.num_starts} died"
        self._on_death(self._reason)

    def restart(self) -> None:
        self.num_starts += 1
        assert self._may_start.wait(30)
        failure = self.births.pop(0) if self.births else None
        if failure is not None:
            raise failure
        self._reason = None
        self._mapped.clear()
        self.asleep.clear()

    def watch(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death

    def adopt(self, segment: Segment) -> None:
        if self._reason is not None:
            raise ConnectionResetError(self._reason)
        self._mapped.add(segment.number)

    def drop(self, segment: Segment) -> None:
        self._mapped.discard(segment.number)

    def sleep(self, tags: Set[SleepTag]) -> None:
        self.asleep |= tags

    def wake(self, tags: Set[SleepTag]) -> None:
        assert tags <= self.asleep
        self.asleep -= tags

    def num_cached_tokens(self) -> int:
        return 0

    def close(self) -> None:
        pass
