"""What answers a teacher's requests once the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdmesh.handles.store import SlabStore
from kdmesh.serving.sleep import Sleep
from kdmesh.types import Handle, ModelDescription
from kdmesh_teacher.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Made by start.py, one of each."""

    model: ModelDescription
    store: SlabStore
    scheduler: Scheduler
    sleep: Sleep
    head_weight: Handle
    head_bias: Handle | None
    cached_tokens: Callable[[], int]  # so far, over all requests
