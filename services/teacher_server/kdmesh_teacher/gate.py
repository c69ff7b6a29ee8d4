"""Whether the server takes requests, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from kdmesh.errors import Unavailable
from kdmesh.handles.store import SlabStore
from kdmesh.types import Handle, ModelDescription
from kdmesh_teacher.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What answers requests once the model is loaded."""

    model: ModelDescription
    store: SlabStore
    scheduler: Scheduler
    head_weight: Handle
    head_bias: Handle | None


class Gate:
    """Loading, then open, then draining; each once."""

    def __init__(self) -> None:
        self._parts: Parts | None = None
        self.refusal: str | None = "loading the model"
        """Why new work is refused; None while it is taken."""

    def open(self, parts: Parts) -> None:
        """Take requests from now on."""
        self._parts = parts
        self.refusal = None

    def drain(self) -> None:
        """Refuse new work from now on; what was promised can still be fetched."""
        self.refusal = "shutting down"

    def parts(self) -> Parts:
        """For what serves promised work, which goes on while draining. Raises Unavailable while loading."""
        if self._parts is None:
            raise Unavailable(f"the server is {self.refusal}", retry_after_s=1.0)
        return self._parts

    def parts_for_new_work(self) -> Parts:
        """Raises Unavailable unless the gate is open."""
        if self.refusal is not None:
            raise Unavailable(f"the server is {self.refusal}", retry_after_s=1.0)
        return self.parts()
