"""One Prefill stream of one session: many requests under way, each with its own answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kdmesh.errors import EngineFailure, RpcError
from kdmesh.images import ImagesMissing
from kdmesh.rpc import codec, failure
from kdmesh.rpc.request_stream import RequestStream
from kdmesh.tracing import spans
from kdmesh.types import ServerLoad, TokenSequence
from kdmesh.v1 import common_pb2
from kdmesh.v1 import teacher_pb2 as pb

if TYPE_CHECKING:
    from kdmesh.v1.teacher_pb2_grpc import TeacherAsyncStub


class PrefillStream:
    """Belongs to the event loop that made it.

    Args:
        on_orphan: called with an answered handle that nobody waits for any more.
        on_load: called with what the server has to do, as every reply says it.
        on_end: called once with the reason when the stream ends by itself.
    """

    def __init__(
        self,
        stub: TeacherAsyncStub,
        address: str,
        *,
        on_orphan: Callable[[common_pb2.Handle], None],
        on_load: Callable[[ServerLoad], None],
        on_end: Callable[[RpcError], None],
    ) -> None:
        self._address = address
        self._on_orphan = on_orphan
        self._on_load = on_load
        self._on_end = on_end
        self._answers: dict[int, asyncio.Future[pb.PrefillResult]] = {}
        self._numbers = itertools.count(1)
        self._stream = RequestStream(stub.Prefill(), address, on_reply=self._take, on_end=self._ended)

    async def ask(
        self,
        session: bytes,
        sequences: Iterable[TokenSequence],
        *,
        model_fingerprint: str,
        layers: Sequence[int] = (),
        weight_version: int = 0,
        uses_cache: bool = True,
        deadline_s: float,
    ) -> pb.PrefillResult:
        """The server's answer to one request.

        Args:
            layers: whose outputs are to be a part of every row, ascending.
            weight_version: of the weights that must make the rows; 0: any.
            uses_cache: whether they may be kept for the next time.

        Raises:
            ImagesMissing: the server lacks images.
            RpcError: as teacher.proto says, or Unavailable when the stream breaks.
        """
        self._stream.check_open()
        request = pb.PrefillRequest(
            session=session,
            request_id=next(self._numbers),
            sequences=codec.sequences_to_wire(sequences),
            model_fingerprint=model_fingerprint,
            layers=layers,
            weight_version=weight_version,
            bypasses_cache=not uses_cache,
            traceparent=spans.current(),
            deadline_ms=max(1, min(round(deadline_s * 1000), 2**32 - 1)),
        )
        answer: asyncio.Future[pb.PrefillResult] = asyncio.get_running_loop().create_future()
        self._answers[request.request_id] = answer
        self._stream.send(request)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._on_orphan(answer.result().rows)  # it came just now
            raise

    async def close(self) -> None:
        """End the stream; what is unanswered fails as Unavailable."""
        await self._stream.close()

    def _take(self, reply: pb.PrefillReply) -> None:
        self._on_load(codec.load_from_wire(reply.load))
        answer = self._answers.pop(reply.request_id, None)
        is_wanted = answer is not None and not answer.done()
        match reply.WhichOneof("outcome"):
            case "result" if not is_wanted:
                self._on_orphan(reply.result.rows)
            case "result" if answer is not None:
                answer.set_result(reply.result)
            case "failure" if answer is not None and is_wanted:
                answer.set_exception(failure.from_wire(reply.failure))
            case "missing_images" if answer is not None and is_wanted:
                answer.set_exception(ImagesMissing(tuple(reply.missing_images.digests)))
            case None if answer is not None and is_wanted:
                answer.set_exception(EngineFailure(f"{self._address} sent a reply without an outcome"))

    def _ended(self, error: RpcError, is_by_itself: bool) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
        if is_by_itself:
            self._on_end(error)
