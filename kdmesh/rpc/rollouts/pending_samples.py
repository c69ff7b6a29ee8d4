"""Samples that are on their way to a thread that blocks for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from typing import Any

from kdmesh.errors import Unavailable
from kdmesh.types import Sample


class PendingSamples:
    """The samples of one prompt. If nobody refers to this any more, what is still missing is aborted."""

    def __init__(self, future: concurrent.futures.Future[list[Sample]]) -> None:
        self._future = future
        weakref.finalize(self, future.cancel).atexit = False

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._future.done()

    def is_done_before(self, other: concurrent.futures.Future[None]) -> bool:
        """Block until this or `other` is done; whether this is."""
        both: tuple[concurrent.futures.Future[Any], ...] = (self._future, other)
        concurrent.futures.wait(both, return_when=concurrent.futures.FIRST_COMPLETED)
        return self.is_done

    def wait(self) -> list[Sample]:
        """All samples, by index. Blocks no longer than the pool's deadline for a request.

        Raises:
            DeadlineExpired: the last one did not come in time.
            ModelMismatch: every server that answers has older weights than the request wants.
            RpcError: the request was refused or failed.
        """
        try:
            return self._future.result()
        except concurrent.futures.CancelledError:
            raise Unavailable("the request was given up, or the connection to the rollout servers closed") from None

    async def arrive(self) -> list[Sample]:
        """As `wait`, for a coroutine; it is cancelled where the connection is closed."""
        return await asyncio.wrap_future(self._future)
