"""A bidirectional rpc whose replies come in the order of the requests, from the client's side."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from kdmesh.errors import EngineFailure, RpcError
from kdmesh.rpc.request_stream import RequestStream

if TYPE_CHECKING:
    import grpc

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


class OrderedStream(Generic[RequestT, ReplyT]):
    """Belongs to the event loop that made it."""

    def __init__(self, call: grpc.aio.StreamStreamCall[RequestT, ReplyT], address: str) -> None:
        """`call` was just started."""
        self._address = address
        self._answers: deque[asyncio.Future[ReplyT]] = deque()  # sent and unanswered, oldest first
        self._stream = RequestStream(call, address, on_reply=self._take, on_end=self._ended)

    def send(self, request: RequestT) -> asyncio.Future[ReplyT]:
        """The answer to a request, which is sent after all those before it.

        It fails with an RpcError as the rpc's proto file says, or with Unavailable when the stream breaks.
        """
        answer: asyncio.Future[ReplyT] = asyncio.get_running_loop().create_future()
        try:
            self._stream.check_open()
        except RpcError as error:
            answer.set_exception(error)
        else:
            self._answers.append(answer)
            self._stream.send(request)
        return answer

    async def close(self) -> None:
        """End the stream; what is unanswered fails as Unavailable."""
        await self._stream.close()

    def _take(self, reply: ReplyT) -> None:
        if not self._answers:
            raise EngineFailure(f"{self._address} answered what it was not asked")
        answer = self._answers.popleft()
        if not answer.done():
            answer.set_result(reply)

    def _ended(self, error: RpcError, is_by_itself: bool) -> None:
        while self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # not every answer is waited for
