"""What answers a teacher's requests once the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdmesh.handles.rdma_memory import RdmaMemory
from kdmesh.handles.store import SlabStore
from kdmesh.serving.outstanding import Outstanding
from kdmesh.serving.sleep import Sleep
from kdmesh.types import ModelDescription
from kdmesh_teacher.cache.row_cache import RowCache
from kdmesh_teacher.scheduler import Scheduler

if TYPE_CHECKING:
    from kdmesh.rpc.weight_updates import WeightUpdates


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Made by start.py, one of each."""

    model_at_start: ModelDescription
    store: SlabStore
    rdma: RdmaMemory | None  # None: the server is not configured for it
    scheduler: Scheduler
    updates: WeightUpdates | None  # None: the weights are frozen
    updating: Outstanding  # updates that are being received
    sleep: Sleep
    run: Callable[[], Coroutine[Any, Any, None]]  # see lifecycle.Service
    cached_tokens: Callable[[], int]  # so far, over all requests
    cache: RowCache | None  # None: no rows are kept

    @property
    def model(self) -> ModelDescription:
        """What is served now."""
        return replace(self.model_at_start, weight_version=self.scheduler.weights.version)
