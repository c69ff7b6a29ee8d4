"""One Generate stream: many requests under way, whose samples come one by one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdmesh.errors import EngineFailure, InvalidRequest, RpcError
from kdmesh.images import ImagesMissing
from kdmesh.rpc import failure
from kdmesh.rpc.request_stream import RequestStream
from kdmesh.rpc.rollouts import codec as rollout_codec
from kdmesh.types import Int32Array, PlacedImage, Sample
from kdmesh.v1 import rollout_pb2 as pb

if TYPE_CHECKING:
    from kdmesh.v1.rollout_pb2_grpc import RolloutAsyncStub


@dataclass(slots=True, kw_only=True, eq=False)
class _Open:
    """A request of which samples are missing."""

    prompt_ids: Int32Array
    images: tuple[PlacedImage, ...]
    missing: set[int]
    on_sample: Callable[[int, Sample], None]
    end: asyncio.Future[None]


class GenerateStream:
    """Belongs to the event loop that made it.

    Args:
        job: name of the job, for the server's metrics.
        on_end: called once with the reason when the stream ends by itself.
    """

    def __init__(self, stub: RolloutAsyncStub, address: str, *, job: str, on_end: Callable[[RpcError], None]) -> None:
        self._address = address
        self._on_end = on_end
        self._open: dict[int, _Open] = {}
        self._numbers = itertools.count(1)
        call = stub.Generate(metadata=rollout_codec.job_to_metadata(job))
        self._stream = RequestStream(call, address, on_reply=self._take, on_end=self._ended)

    async def ask(
        self,
        request: pb.GenerateRequest,
        prompt_ids: Int32Array,
        on_sample: Callable[[int, Sample], None],
        *,
        images: tuple[PlacedImage, ...] = (),
    ) -> None:
        """Return when every sample of the request has been given to `on_sample`, with its index. Cancelling aborts it.

        Its request_id is overwritten.

        Raises:
            ImagesMissing: the server lacks images; nothing was sampled.
            RpcError: as rollout.proto says, or Unavailable when the stream breaks; samples may have come before.
            EngineFailure: an answer is not one to this request.
        """
        self._stream.check_open()
        request.request_id = next(self._numbers)
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open[request.request_id] = _Open(
            prompt_ids=prompt_ids, images=images, missing=set(range(request.num_samples)), on_sample=on_sample, end=end
        )
        self._stream.send(request)
        try:
            await end
        finally:
            if self._open.pop(request.request_id, None) is not None:  # it goes on without us
                self._stream.send(pb.GenerateRequest(request_id=request.request_id, is_abort=True))

    async def close(self) -> None:
        """End the stream; what is unanswered fails as Unavailable."""
        await self._stream.close()

    def _take(self, reply: pb.GenerateReply) -> None:
        opened = self._open.get(reply.request_id)
        if opened is None:
            return  # aborted here before it came
        match reply.WhichOneof("outcome"):
            case "sample":
                self._take_sample(reply.request_id, opened, reply.sample)
            case "failure":
                self._close_request(reply.request_id, failure.from_wire(reply.failure), is_ended=True)
            case "missing_images":
                missing = ImagesMissing(tuple(reply.missing_images.digests))
                self._close_request(reply.request_id, missing, is_ended=True)
            case None:
                self._close_request(reply.request_id, self._lie("a reply without an outcome"))

    def _take_sample(self, request_id: int, opened: _Open, message: pb.Sample) -> None:
        index = message.sample_index
        if index not in opened.missing:
            self._close_request(request_id, self._lie(f"sample {index}, which is not missing"))
            return
        try:
            sample = rollout_codec.sample_from_wire(message, opened.prompt_ids, opened.images)
        except InvalidRequest as error:
            self._close_request(request_id, self._lie(f"no valid sample: {error}"))
            return
        opened.missing.remove(index)
        opened.on_sample(index, sample)
        if not opened.missing:
            self._close_request(request_id, None, is_ended=True)

    def _close_request(
        self, request_id: int, error: RpcError | ImagesMissing | None, *, is_ended: bool = False
    ) -> None:
        """Tell who waits. Unless the server has ended it, it is aborted there when they hear of it."""
        opened = self._open.pop(request_id) if is_ended else self._open[request_id]
        if opened.end.done():
            return
        if error is None:
            opened.end.set_result(None)
        else:
            opened.end.set_exception(error)

    def _lie(self, what: str) -> EngineFailure:
        return EngineFailure(f"{self._address} sent {what}")

    def _ended(self, error: RpcError, is_by_itself: bool) -> None:
        for opened in self._open.values():
            if not opened.end.done():
                opened.end.set_exception(error)
        self._open.clear()
        if is_by_itself:
            self._on_end(error)
