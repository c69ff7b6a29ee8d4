"""Whether a server takes requests, and why not."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from kdmesh.errors import Unavailable

P = TypeVar("P")


class Gate(Generic[P]):
    """Loading, then open, then draining; each once. Holds the parts that answer requests once the model is loaded.

    While it is open, somebody may pause the work of the engine; clients still come and go.
    """

    def __init__(self) -> None:
        self._parts: P | None = None
        self._closed: str | None = "the server is loading the model"
        self._pauses: dict[object, str] = {}
        self.changed = asyncio.Event()
        """Set whenever `refusal` may have changed; whoever waits for it clears it."""

    @property
    def is_loaded(self) -> bool:
        """Whether there are parts."""
        return self._parts is not None

    @property
    def refusal(self) -> str | None:
        """Why new work is refused, as a sentence; None while it is taken."""
        return self.refusal_of_others(None)

    def refusal_of_others(self, owner: object) -> str | None:
        """The same but for what `owner` has to say."""
        return self._closed or next((reason for other, reason in self._pauses.items() if other is not owner), None)

    def open(self, parts: P) -> None:
        """Take requests from now on."""
        self._parts = parts
        self._closed = None
        self.changed.set()

    def drain(self) -> None:
        """Refuse new work from now on; what was promised can still be fetched."""
        self._closed = "the server is shutting down"
        self.changed.set()

    def pause(self, owner: object, reason: str) -> None:
        """Refuse work for the engine until the same owner calls `resume`.

        Args:
            owner: has one reason at a time; a later one replaces it.
            reason: a sentence.
        """
        self._pauses[owner] = reason
        self.changed.set()

    def resume(self, owner: object) -> None:
        """The owner's reason is gone; nothing happens when there is none."""
        self._pauses.pop(owner, None)
        self.changed.set()

    def parts(self) -> P:
        """For what serves promised work, which goes on while draining. Raises Unavailable while loading."""
        if self._parts is None:
            raise Unavailable(str(self._closed), retry_after_s=1.0)
        return self._parts

    def parts_for_new_clients(self) -> P:
        """For what needs no engine, also while that is paused. Raises Unavailable unless the gate is open."""
        if self._closed is not None:
            raise Unavailable(self._closed, retry_after_s=1.0)
        return self.parts()

    def parts_for_new_work(self) -> P:
        """Raises Unavailable unless the gate is open and nobody pauses it."""
        if self.refusal is not None:
            raise Unavailable(self.refusal, retry_after_s=1.0)
        return self.parts()
