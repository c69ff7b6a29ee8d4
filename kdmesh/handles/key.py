"""What gives access to a handle's bytes."""

from __future__ import annotations

from typing import Protocol


class Key(Protocol):
    """The part of a handle that gives access; a Handle is one."""

    @property
    def segment(self) -> int:
        """Number of the segment."""

    @property
    def epoch(self) -> int:
        """Generation of its memory."""

    @property
    def token(self) -> bytes:
        """The secret."""
