"""Whether a server takes requests, and why not."""

from __future__ import annotations

from typing import Generic, TypeVar

from kdmesh.errors import Unavailable

P = TypeVar("P")


class Gate(Generic[P]):
    """Loading, then open, then draining; each once. Holds the parts that answer requests once the model is loaded."""

    def __init__(self) -> None:
        self._parts: P | None = None
        self.refusal: str | None = "loading the model"
        """Why new work is refused; None while it is taken."""

    def open(self, parts: P) -> None:
        """Take requests from now on."""
        self._parts = parts
        self.refusal = None

    def drain(self) -> None:
        """Refuse new work from now on; what was promised can still be fetched."""
        self.refusal = "shutting down"

    def parts(self) -> P:
        """For what serves promised work, which goes on while draining. Raises Unavailable while loading."""
        if self._parts is None:
            raise Unavailable(f"the server is {self.refusal}", retry_after_s=1.0)
        return self._parts

    def parts_for_new_work(self) -> P:
        """Raises Unavailable unless the gate is open."""
        if self.refusal is not None:
            raise Unavailable(f"the server is {self.refusal}", retry_after_s=1.0)
        return self.parts()
