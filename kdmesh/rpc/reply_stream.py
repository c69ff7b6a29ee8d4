"""The server's side of a stream that many tasks answer on."""

from __future__ import annotations

import asyncio
from typing import Any

from kdmesh.rpc.boundary import Context


class ReplyStream:
    """Replies from many tasks, one write at a time, which is what grpc allows."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._turn = asyncio.Lock()

    async def write(self, reply: Any) -> None:
        """Send a reply, a message of the method's type."""
        async with self._turn:
            await self._context.write(reply)
