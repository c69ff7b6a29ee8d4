"""The server's side of a stream that many tasks answer on."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from kdmesh.errors import Unavailable
from kdmesh.rpc.boundary import Context

_MAX_UNREAD = 256  # replies
_MAX_UNREAD_S = 60.0  # clients of ours read in a thread of its own, whatever else they do


class ReplyStream:
    """Replies from many tasks, one write at a time, which is what grpc allows.

    A context manager around these tasks. When they have ended, it waits until the client reads what is being written,
    or goes: before that grpc lets nobody end the call.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._turn = asyncio.Lock()
        self._room = asyncio.Semaphore(_MAX_UNREAD)
        self._writing: asyncio.Future[None] | None = None
        self._is_unread = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None:
            await asyncio.wait((self._writing,))
            self._writing.exception()  # the client has gone, which is told otherwise

    async def write(self, reply: Any) -> None:
        """Send a reply, a message of the method's type.

        Raises:
            Unavailable: the client does not read; the stream must end.
        """
        async with self._room, self._turn:
            if not self._is_unread:
                self._writing = asyncio.ensure_future(self._context.write(reply))
                done, _ = await asyncio.wait((self._writing,), timeout=_MAX_UNREAD_S)
                self._is_unread = not done
            if self._is_unread:
                raise Unavailable(f"the client has not read a reply for {_MAX_UNREAD_S:g} s")
            writing, self._writing = self._writing, None
            assert writing is not None
            writing.result()

    async def wait_room(self) -> None:
        """Return when few enough replies wait for the client to read them."""
        async with self._room:
            pass
