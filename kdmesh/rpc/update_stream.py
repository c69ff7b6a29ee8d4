"""One UpdateWeights stream, from the sender's side."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from kdmesh.errors import EngineFailure, RpcError, Unavailable
from kdmesh.rpc.calls import our_errors
from kdmesh.v1 import rollout_pb2 as pb

if TYPE_CHECKING:
    from kdmesh.v1.rollout_pb2_grpc import RolloutAsyncStub


class UpdateStream:
    """Belongs to the event loop that made it."""

    def __init__(self, stub: RolloutAsyncStub, address: str) -> None:
        self._address = address
        self._call = stub.UpdateWeights()
        self._unsent: asyncio.Queue[pb.UpdateWeightsRequest] = asyncio.Queue()
        self._answers: deque[asyncio.Future[pb.UpdateWeightsReply]] = deque()  # sent and unanswered, oldest first
        self._end: RpcError | None = None
        # Tasks of their own: grpc ends the whole stream when a task that writes to it is cancelled.
        self._tasks = (
            asyncio.create_task(self._write(), name="update writer"),
            asyncio.create_task(self._read(), name="update reader"),
        )

    def send(self, request: pb.UpdateWeightsRequest) -> asyncio.Future[pb.UpdateWeightsReply]:
        """The answer to a step, which is sent after all those before it.

        It fails with an RpcError as rollout.proto says, or with Unavailable when the stream breaks.
        """
        answer: asyncio.Future[pb.UpdateWeightsReply] = asyncio.get_running_loop().create_future()
        if self._end is not None:
            answer.set_exception(self._end)
        else:
            self._answers.append(answer)
            self._unsent.put_nowait(request)
        return answer

    async def close(self) -> None:
        """End the stream; what is unanswered fails as Unavailable. Without a commit, the server drops the update."""
        self._fail(Unavailable(f"the update of {self._address} was ended", retry_after_s=0.0))
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        # The connection lasts as long as its call, which would wait for the garbage collector: errors refer to frames,
        # and those to this.
        del self._call, self._tasks

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
                    self._take(reply)
            self._fail(Unavailable(f"{self._address} ended the stream", retry_after_s=0.0))
        except RpcError as error:
            self._fail(error)

    def _take(self, reply: pb.UpdateWeightsReply) -> None:
        if not self._answers:
            raise EngineFailure(f"{self._address} answered what it was not asked")
        answer = self._answers.popleft()
        if not answer.done():
            answer.set_result(reply)

    def _fail(self, error: RpcError) -> None:
        self._end = self._end or error
        while self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # not every answer is waited for
