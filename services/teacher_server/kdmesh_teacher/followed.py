"""Which job a teacher follows whose weights can be replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection

from kdmesh.errors import ModelMismatch


class FollowedJob:
    """The job that has updated the weights last, as long as it is connected.

    Args:
        connected: the jobs that have a session now.
    """

    def __init__(self, connected: Callable[[], Collection[str]]) -> None:
        self._connected = connected
        self._job: str | None = None

    def admit(self, job: str) -> None:
        """A job wants to replace the weights. Raises ModelMismatch when they follow another one's student."""
        if self._job not in (None, job) and self._job in self._connected():
            raise ModelMismatch(
                f"the weights of this teacher follow job {self._job}, which is connected; job {job or '(unnamed)'} "
                "needs a teacher of its own"
            )

    def taken(self, job: str) -> None:
        """The weights are those of this job now."""
        self._job = job
