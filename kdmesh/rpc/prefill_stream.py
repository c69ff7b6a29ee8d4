"""One Prefill stream of one session: many requests under way, each with its own answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kdmesh.errors import EngineFailure, RpcError, Unavailable
from kdmesh.rpc import codec, failure
from kdmesh.rpc.calls import our_errors
from kdmesh.types import TokenSequence
from kdmesh.v1 import common_pb2
from kdmesh.v1 import teacher_pb2 as pb

if TYPE_CHECKING:
    from kdmesh.v1.teacher_pb2_grpc import TeacherAsyncStub


class PrefillStream:
    """Belongs to the event loop that made it.

    Args:
        on_orphan: called with an answered handle that nobody waits for any more.
        on_end: called once with the reason when the stream ends by itself.
    """

    def __init__(
        self,
        stub: TeacherAsyncStub,
        address: str,
        *,
        on_orphan: Callable[[common_pb2.Handle], None],
        on_end: Callable[[RpcError], None],
    ) -> None:
        self._address = address
        self._on_orphan = on_orphan
        self._on_end = on_end
        self._answers: dict[int, asyncio.Future[pb.PrefillResult]] = {}
        self._numbers = itertools.count(1)
        self._end: RpcError | None = None
        self._call = stub.Prefill()
        self._unsent: asyncio.Queue[pb.PrefillRequest] = asyncio.Queue()
        # A task of its own: grpc ends the whole stream when a task that writes to it is cancelled.
        self._writer = asyncio.create_task(self._write(), name="prefill writer")
        self._reader = asyncio.create_task(self._read(), name="prefill reader")

    async def ask(
        self, session: bytes, sequences: Iterable[TokenSequence], *, model_fingerprint: str, deadline_s: float
    ) -> pb.PrefillResult:
        """The server's answer to one request.

        Raises:
            RpcError: as teacher.proto says, or Unavailable when the stream breaks.
        """
        if self._end is not None:
            raise self._end
        request = pb.PrefillRequest(
            session=session,
            request_id=next(self._numbers),
            sequences=codec.sequences_to_wire(sequences),
            model_fingerprint=model_fingerprint,
            deadline_ms=max(1, min(round(deadline_s * 1000), 2**32 - 1)),
        )
        answer: asyncio.Future[pb.PrefillResult] = asyncio.get_running_loop().create_future()
        self._answers[request.request_id] = answer
        self._unsent.put_nowait(request)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._on_orphan(answer.result().rows)  # it came just now
            raise

    async def close(self) -> None:
        """End the stream; what is unanswered fails as Unavailable."""
        self._fail(Unavailable(f"the connection to {self._address} was closed", retry_after_s=0.0))
        self._call.cancel()
        for task in (self._writer, self._reader):
            task.cancel()
        await asyncio.wait((self._writer, self._reader))

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
            end: RpcError = Unavailable(f"{self._address} ended the stream", retry_after_s=0.0)
        except RpcError as error:
            end = error
        if self._end is None:
            self._fail(end)
            self._on_end(end)

    def _take(self, reply: pb.PrefillReply) -> None:
        answer = self._answers.pop(reply.request_id, None)
        is_wanted = answer is not None and not answer.done()
        match reply.WhichOneof("outcome"):
            case "result" if not is_wanted:
                self._on_orphan(reply.result.rows)
            case "result" if answer is not None:
                answer.set_result(reply.result)
            case "failure" if answer is not None and is_wanted:
                answer.set_exception(failure.from_wire(reply.failure))
            case None if answer is not None and is_wanted:
                answer.set_exception(EngineFailure(f"{self._address} sent a reply without an outcome"))

    def _fail(self, error: RpcError) -> None:
        self._end = error
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
