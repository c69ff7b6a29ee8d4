"""A bidirectional rpc as its client sees it: requests go out in order, replies are handed over as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import grpc

from kdmesh.errors import RpcError, Unavailable
from kdmesh.rpc.calls import our_errors

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


class RequestStream(Generic[RequestT, ReplyT]):
    """Belongs to the event loop that made it.

    Args:
        call: just started.
        address: of the server, for messages.
        on_reply: called with every reply, in order.
        on_end: called once, with why nothing more will come and whether the stream ended by itself.
    """

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[RequestT, ReplyT],
        address: str,
        *,
        on_reply: Callable[[ReplyT], None],
        on_end: Callable[[RpcError, bool], None],
    ) -> None:
        self._call = call
        self._address = address
        self._on_reply = on_reply
        self._on_end = on_end
        self._end: RpcError | None = None
        self._unsent: asyncio.Queue[RequestT] = asyncio.Queue()
        # A task of its own: grpc ends the whole stream when a task that writes to it is cancelled.
        self._writer = asyncio.create_task(self._write(), name="request writer")
        self._reader = asyncio.create_task(self._read(), name="reply reader")

    def check_open(self) -> None:
        """Raises the RpcError that ended it."""
        if self._end is not None:
            raise self._end

    def send(self, request: RequestT) -> None:
        """Send a request when those before it are sent."""
        self._unsent.put_nowait(request)

    async def close(self) -> None:
        """End the stream, as Unavailable. Called once, and last."""
        self._finish(
            Unavailable(f"the connection to {self._address} was closed", retry_after_s=0.0), is_by_itself=False
        )
        self._call.cancel()
        for task in (self._writer, self._reader):
            task.cancel()
        await asyncio.wait((self._writer, self._reader))
        # The connection lasts as long as its call, which would wait for the garbage collector: errors refer to frames,
        # and those to this.
        del self._call, self._writer, self._reader

    async def _write(self) -> None:
        try:
            with our_errors(self._address):
                while True:
                    await self._call.write(await self._unsent.get())
        except RpcError:
            return  # the reader hears the reason

    async def _read(self) -> None:
        try:
            with our_errors(self._address):
                async for reply in self._call:
                    self._on_reply(reply)
            end: RpcError = Unavailable(f"{self._address} ended the stream", retry_after_s=0.0)
        except RpcError as error:
            end = error
        self._finish(end, is_by_itself=True)

    def _finish(self, error: RpcError, *, is_by_itself: bool) -> None:
        if self._end is None:
            self._end = error
            self._on_end(error, is_by_itself)
