"""What answers a rollout server's requests once the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdmesh.rpc.weights.updates import WeightUpdates
from kdmesh.serving.engine.sleep import Sleep
from kdmesh.serving.engine.updating import Updating
from kdmesh.serving.http.status import Working
from kdmesh.serving.images import ImageStore
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.state import JobState, job_states
from kdmesh.serving.jobs.table import JobTable
from kdmesh.types import RolloutDescription
from kdmesh_rollout.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Made by start.py, one of each."""

    model_at_start: RolloutDescription
    scheduler: Scheduler
    updates: WeightUpdates
    updating: Updating
    sleep: Sleep
    images: ImageStore | None  # None: the model reads none
    run: Callable[[], Coroutine[Any, Any, None]]  # see lifecycle.Parts

    @property
    def model(self) -> RolloutDescription:
        """What is served now."""
        return replace(self.model_at_start, weight_version=self.updates.version)

    @property
    def jobs(self) -> JobTable[JobTerms]:
        """What each job may take, and has taken."""
        return self.scheduler.jobs

    def job_states(self, only: str | None = None) -> Sequence[JobState]:
        """Of every job that is known, or of one."""
        return job_states(self.jobs, self.scheduler.queue, {}, only)

    def working(self) -> Working:
        """What the server does, on one screen."""
        states = self.job_states()
        return Working(
            model=self.model.name,
            weight_version=self.updates.version,
            waiting_requests=self.scheduler.queue.num_requests,
            waiting_tokens=self.scheduler.queue.num_tokens,
            tokens_per_s=sum(state.tokens_per_s for state in states),
            engine_tokens_per_s=self.scheduler.tokens_per_s,
            slab=None,
            jobs=states,
        )
