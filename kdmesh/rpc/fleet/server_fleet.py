"""The servers of one kind that a job asks, all of the same model."""

from __future__ import annotations

from typing import Generic, TypeVar

from kdmesh.rpc.fleet.replica import Client
from kdmesh.rpc.fleet.replicas import Replicas
from kdmesh.rpc.retry import Deadline
from kdmesh.types import SleepTag

C = TypeVar("C", bound=Client)


class ServerFleet(Generic[C]):
    """What fleets of every kind have in common. Belongs to one event loop."""

    _replicas: Replicas[C]

    @property
    def retries(self) -> int:
        """Requests that were sent once more."""
        return self._replicas.retries

    async def start(self, deadline: Deadline) -> None:
        """Connect. Returns when every server has been tried and one answers.

        Raises:
            ConfigError, ModelMismatch, Unauthenticated, PermissionDenied: a server that answers is of no use.
            DeadlineExpired: none answers.
        """
        await self._replicas.start(deadline)

    async def set_asleep(self, tags: frozenset[SleepTag], deadline: Deadline) -> None:
        """See Replicas."""
        await self._replicas.set_asleep(tags, deadline)

    async def close(self) -> None:
        """Close every connection."""
        await self._replicas.close()
