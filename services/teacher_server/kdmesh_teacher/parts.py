"""What answers a teacher's requests once the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdmesh.handles.rdma.memory import RdmaMemory
from kdmesh.handles.slab.store import SlabStore
from kdmesh.serving.engine.sleep import Sleep
from kdmesh.serving.engine.updating import Updating
from kdmesh.serving.http.status import SlabStatus, Working
from kdmesh.serving.images import ImageStore
from kdmesh.serving.jobs.state import Holdings, JobState, job_states
from kdmesh.serving.jobs.table import JobTable
from kdmesh.types import CacheAnswer, ModelDescription, TokenSequence
from kdmesh_teacher.cache import entry_file
from kdmesh_teacher.cache.row_cache import RowCache
from kdmesh_teacher.config import TeacherJobTerms
from kdmesh_teacher.scheduler import Scheduler

if TYPE_CHECKING:
    from kdmesh.rpc.teachers.row_carrier import RowCarrier
    from kdmesh.rpc.weights.updates import WeightUpdates


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Made by start.py, one of each."""

    model_at_start: ModelDescription
    store: SlabStore
    rdma: RdmaMemory | None  # None: the server is not configured for it
    scheduler: Scheduler
    updates: WeightUpdates | None  # None: the weights are frozen
    carrier: RowCarrier | None  # None: no groups are made
    updating: Updating
    sleep: Sleep
    run: Callable[[], Coroutine[Any, Any, None]]  # see lifecycle.Parts
    cached_tokens: Callable[[], int]  # so far, over all requests
    cache: RowCache | None  # None: no rows are kept
    images: ImageStore | None  # None: the model reads none

    @property
    def model(self) -> ModelDescription:
        """What is served now."""
        return replace(self.model_at_start, weight_version=self.scheduler.weights.version)

    @property
    def jobs(self) -> JobTable[TeacherJobTerms]:
        """What each job may take, and has taken."""
        return self.scheduler.jobs

    def holdings(self) -> Mapping[str, Holdings]:
        """What jobs hold of the slab, with those that are gone while a client of theirs still maps a slot."""
        found: dict[str, Holdings] = {}
        for session in self.store.snapshot().sessions:
            found.setdefault(session.job, Holdings()).sessions += 1
        for job, slots in self.store.slots_by_job().items():
            held = found.setdefault(job, Holdings())
            held.slots, held.slab_bytes = slots, slots * self.store.slot_bytes
        return found

    def job_states(self, only: str | None = None) -> Sequence[JobState]:
        """Of every job that is known, or of one."""
        return job_states(self.jobs, self.scheduler.queue, self.holdings(), only)

    def find_cached(
        self, job: str, weight_version: int, sequences: Sequence[TokenSequence], layers: Sequence[int]
    ) -> CacheAnswer:
        """What is kept for a job of the rows of these sequences, with the outputs of these layers."""
        cache = self.cache
        return CacheAnswer(
            is_kept=(False,) * len(sequences)
            if cache is None
            else cache.find(job, weight_version, sequences, layers).is_kept,
            budget_bytes=0 if cache is None else cache.state().budget_bytes,
            entry_bytes=entry_file.MAX_OVERHEAD_BYTES,
            tokens_per_s=self.scheduler.load.tokens_per_s,
        )

    def working(self) -> Working:
        """What the server does, on one screen."""
        states, load, slab = self.job_states(), self.scheduler.load, self.store.snapshot()
        return Working(
            model=self.model.name,
            weight_version=self.scheduler.weights.version,
            waiting_requests=self.scheduler.queue.num_requests,
            waiting_tokens=self.scheduler.queue.num_tokens,
            tokens_per_s=sum(state.tokens_per_s for state in states),
            engine_tokens_per_s=load.tokens_per_s,
            slab=SlabStatus(
                slots={state.value: count for state, count in slab.slots.items()},
                slot_bytes=slab.slot_bytes,
                orphans=slab.orphans,
            ),
            jobs=states,
        )
