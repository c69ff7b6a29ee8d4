"""Whose turn it is on devices that the student shares with its rollout servers and its teachers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from typing import Protocol

from kdmesh.errors import KdmeshError
from kdmesh.models.resting_weights import give_back_memory
from kdmesh.types import EVERY_TAG, SleepTag
from kdmesh_trainer.loop import Evaluator, Publisher, Stop
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.stats import Scores
from kdmesh_trainer.stop import losing_the_step

log = logging.getLogger(__name__)

_LAST_WAKE_S = 10.0


class Servers(Protocol):
    """Servers that can give a device's memory back; a TeacherPool is some, and so is a RolloutPool."""

    def sleep(self, tags: Set[SleepTag] = EVERY_TAG) -> None:
        """Have all of them give back these tags and no others. Blocks."""
        ...

    def wake(self, *, within_s: float | None = None) -> None:
        """Have all of them take everything again. Blocks."""
        ...


class Devices(Protocol):
    """Says what comes next, and returns when the devices are free for it. Collective; nothing may be under way.

    Raises StepLost where somebody does not give them back, or take them.
    """

    @property
    def are_shared(self) -> bool:
        """Whether sampling and scoring must not go on at the same time, nor while the student is published."""
        ...

    def publish(self) -> None:
        """New weights go to the rollout servers."""
        ...

    def sample(self) -> None:
        """The rollout servers sample."""
        ...

    def score(self) -> None:
        """Teachers answer, and the student computes."""
        ...


class OwnDevices:
    """Everybody has devices of their own."""

    are_shared = False

    def publish(self) -> None:
        """They are free."""

    def sample(self) -> None:
        """They are free."""

    def score(self) -> None:
        """They are free."""


class SharedDevices:
    """Who has no turn sleeps; before somebody is woken, the others have gone to sleep.

    Ranks keep the student and its optimizer, and give back what torch would keep of a step for the next one.
    """

    are_shared = True

    def __init__(self, rollouts: Servers, teachers: Servers, mesh: Mesh) -> None:
        self._rollouts = rollouts
        self._teachers = teachers
        self._mesh = mesh

    def publish(self) -> None:
        """Rollout servers have their weights only."""
        self._on_first(self._teachers.sleep, lambda: self._rollouts.sleep({SleepTag.KV_CACHE}))

    def sample(self) -> None:
        """Teachers sleep."""
        self._on_first(self._teachers.sleep, self._rollouts.wake)

    def score(self) -> None:
        """Rollout servers sleep."""
        self._on_first(self._rollouts.sleep, self._teachers.wake)

    def close(self) -> None:
        """Leave all of them awake, as far as there is memory for that. Not collective."""
        if self._mesh.is_first:
            for servers in (self._teachers, self._rollouts):
                try:
                    servers.wake(within_s=_LAST_WAKE_S)
                except KdmeshError as error:
                    log.warning("servers stay asleep", extra={"reason": str(error)})

    def _on_first(self, *calls: Callable[[], None]) -> None:
        def call_all() -> None:
            for call in calls:
                call()

        give_back_memory(self._mesh.device)
        self._mesh.gather(None)  # until every rank has: servers lie on the devices of all
        with losing_the_step():
            self._mesh.on_first(call_all)


class ScoringEvaluator:
    """Another evaluator, for which it is the teachers' turn."""

    def __init__(self, evaluator: Evaluator, devices: Devices) -> None:
        self._evaluator = evaluator
        self._devices = devices

    def evaluate(self, *, stop: Stop) -> Scores:
        """See Evaluator."""
        self._devices.score()
        return self._evaluator.evaluate(stop=stop)


class ScoringPublisher:
    """Another publisher, which brings the student to teachers on their turn."""

    def __init__(self, publisher: Publisher, devices: Devices) -> None:
        self._publisher = publisher
        self._devices = devices

    def publish(self, *, version: int) -> None:
        """See Publisher."""
        self._devices.score()
        self._publisher.publish(version=version)
