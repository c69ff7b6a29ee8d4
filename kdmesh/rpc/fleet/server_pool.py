"""All servers of one kind that a job asks, for a thread that blocks."""

from __future__ import annotations

from collections.abc import Callable, Set
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from kdmesh.rpc.background_loop import BackgroundLoop
from kdmesh.rpc.fleet.server_fleet import ServerFleet
from kdmesh.rpc.retry import Deadline
from kdmesh.types import EVERY_TAG, SleepTag

F = TypeVar("F", bound="ServerFleet[Any]")


class ServerPool(Generic[F]):
    """A fleet on the background loop. A context manager."""

    def __init__(self, make_fleet: Callable[[], F], *, deadline_s: float, connect_s: float | None) -> None:
        """Connect. Blocks until a server is ready.

        Args:
            make_fleet: called on the background loop.
            deadline_s: longest wait for servers to fall asleep or to wake.
            connect_s: longest wait for the first server; None: `deadline_s`.
        """
        self._deadline_s = deadline_s
        self._loop = BackgroundLoop()
        try:
            self._fleet = self._loop.run(_started, make_fleet, deadline_s if connect_s is None else connect_s)
        except BaseException:
            self._loop.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sleep(self, tags: Set[SleepTag] = EVERY_TAG) -> None:
        """Have every server give these back, and nothing else; also those that connect later. Blocks.

        Nothing should be under way: what waits there fails and is tried again, what is computed is waited for.

        Raises:
            DeadlineExpired: a server did not finish what it computes in time.
            InvalidRequest: a server's engine cannot sleep.
        """
        self._loop.run(self._fleet.set_asleep, frozenset(tags), Deadline.after(self._deadline_s))

    def wake(self, *, within_s: float | None = None) -> None:
        """Have every server take everything again; also those that connect later. Blocks.

        Raises:
            DeadlineExpired: a server did not get the memory in time: `within_s`, or this pool's deadline.
        """
        deadline = Deadline.after(self._deadline_s if within_s is None else within_s)
        self._loop.run(self._fleet.set_asleep, frozenset[SleepTag](), deadline)

    def give_up(self) -> None:
        """Abort the requests that are under way; whoever waits for one gets Unavailable. Any thread; does not block."""
        self._loop.abort()

    def close(self) -> None:
        """Abort what is under way and end the thread; whoever still waits gets Unavailable. Tensors stay good."""
        if not self._loop.is_closed:
            self._loop.run(self._fleet.close)
            self._loop.close()


async def _started(make_fleet: Callable[[], F], connect_s: float) -> F:
    fleet = make_fleet()
    try:
        await fleet.start(Deadline.after(connect_s))
    except BaseException:
        await fleet.close()
        raise
    return fleet
