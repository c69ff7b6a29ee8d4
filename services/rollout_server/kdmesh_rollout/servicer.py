"""Answers the rpcs of rollout.proto."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc

from kdmesh.errors import DeadlineExpired, InvalidRequest, RpcError, Unavailable
from kdmesh.images import ImagesMissing
from kdmesh.rpc import codec, failure
from kdmesh.rpc.caller import caller_name
from kdmesh.rpc.reply_stream import ReplyStream
from kdmesh.rpc.rollouts import codec as rollout_codec
from kdmesh.serving.engine import sleep_rpcs
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.jobs.table import check_name
from kdmesh.serving.outstanding import Outstanding
from kdmesh.tracing import spans
from kdmesh.v1 import common_pb2, weights_pb2
from kdmesh.v1 import rollout_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutServicer
from kdmesh_rollout import admission
from kdmesh_rollout.metrics import Metrics
from kdmesh_rollout.parts import Parts
from kdmesh_rollout.work import Answers, SampleRequest

_MAX_OPEN_REQUESTS = 65_536  # of one stream

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Servicer(RolloutServicer):
    """The gRPC surface: checks what comes in, asks the parts, answers; the error boundary is outside.

    The streaming methods write to their context instead of yielding, which grpc.aio allows and
    the generated types do not know.
    """

    def __init__(self, gate: Gate[Parts], metrics: Metrics, *, max_request_s: float) -> None:
        self._gate = gate
        self._metrics = metrics
        self._max_request_s = max_request_s
        self.outstanding = Outstanding()
        """Requests that have come in, until they are answered."""

    async def Describe(self, request: pb.DescribeRolloutRequest, context: Context) -> pb.DescribeRolloutResponse:
        """See rollout.proto."""
        return rollout_codec.rollout_description_to_wire(self._gate.parts_for_new_clients().model)

    async def Generate(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Context
    ) -> None:
        """See rollout.proto."""
        replies = ReplyStream(context)
        stream = _Generation(self._gate, self._metrics, replies, job=_job(context))
        async with replies, asyncio.TaskGroup() as requests:
            async for request in request_iterator:
                await replies.wait_room()
                if request.is_abort:
                    stream.abort(request.request_id)
                else:
                    requests.create_task(self._answer(stream, request, stream.admit(request.request_id)))

    async def _answer(self, stream: _Generation, request: pb.GenerateRequest, opened: _Open) -> None:
        with self.outstanding:
            await stream.answer(request, opened, max_request_s=self._max_request_s)

    async def PutImages(self, request: common_pb2.PutImagesRequest, context: Context) -> common_pb2.PutImagesResponse:
        """See rollout.proto."""
        parts = self._gate.parts()
        if parts.images is None:
            raise InvalidRequest(f"model {parts.model.name} reads no images")
        await parts.images.put(request.images)
        return common_pb2.PutImagesResponse()

    async def UpdateWeights(  # type: ignore[override]
        self, request_iterator: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: Context
    ) -> None:
        """See rollout.proto."""
        parts = self._gate.parts_for_new_clients()
        parts.sleep.require_weights()
        async with parts.updating.receiving(), aclosing(parts.updates.answer(request_iterator)) as replies:
            async for reply in replies:
                await context.write(reply)

    async def Sleep(self, request: common_pb2.SleepRequest, context: Context) -> common_pb2.SleepResponse:
        """See rollout.proto."""
        return await sleep_rpcs.answer_sleep(self._gate.parts().sleep, request)

    async def Wake(self, request: common_pb2.WakeRequest, context: Context) -> common_pb2.WakeResponse:
        """See rollout.proto."""
        return await sleep_rpcs.answer_wake(self._gate.parts().sleep, request)


@dataclass(slots=True, eq=False)
class _Open:
    """A request without an answer."""

    answers: Answers | None = None  # once it waits for the engine
    is_aborted: bool = False
    num_tokens: int = 0  # of the samples that have come


class _Generation:
    """One Generate stream: its open requests, and the replies to them."""

    def __init__(self, gate: Gate[Parts], metrics: Metrics, replies: ReplyStream, *, job: str) -> None:
        self._gate = gate
        self._metrics = metrics
        self._replies = replies
        self._job = job
        self._session = secrets.token_bytes(8)
        self._open: dict[int, _Open] = {}

    def admit(self, request_id: int) -> _Open:
        """Raises InvalidRequest, which ends the stream, when an open request has this number."""
        if request_id in self._open:
            raise InvalidRequest(f"request_id {request_id} is that of a request without an answer")
        self._open[request_id] = _Open()
        return self._open[request_id]

    def abort(self, request_id: int) -> None:
        """Forget a request; nothing happens when there is none of this number."""
        opened = self._open.pop(request_id, None)
        if opened is not None:
            opened.is_aborted = True
            if opened.answers is not None:
                opened.answers.abort()

    async def answer(self, request: pb.GenerateRequest, opened: _Open, *, max_request_s: float) -> None:
        """Send the samples as they come, or the reason why no more do."""
        outcome = "cancelled"
        try:
            await self._traced(request, opened, max_request_s)
            outcome = "aborted" if opened.is_aborted else "ok"
        except ImagesMissing as error:
            outcome = ImagesMissing.__name__
            missing = common_pb2.MissingImages(digests=error.digests)
            await self._replies.write(pb.GenerateReply(request_id=request.request_id, missing_images=missing))
        except RpcError as error:
            outcome = type(error).__name__
            if not opened.is_aborted:
                message = failure.to_wire(error)
                await self._replies.write(pb.GenerateReply(request_id=request.request_id, failure=message))
        finally:
            if self._open.get(request.request_id) is opened:
                del self._open[request.request_id]
            self._metrics.request_done(self._job, outcome)

    async def _traced(self, request: pb.GenerateRequest, opened: _Open, max_request_s: float) -> None:
        """Send the samples, with spans of what they waited for."""
        with spans.span(
            "generate request",
            parent=request.traceparent,
            job=self._job,
            request_id=request.request_id,
            samples=request.num_samples,
        ):
            arrived_s = time.time()
            try:
                await self._send_samples(request, opened, max_request_s)
            finally:
                began_s = None if opened.answers is None else opened.answers.began_s
                spans.record("queue", begin_s=arrived_s, end_s=began_s or time.time())
                if began_s is not None:
                    spans.record("decode", begin_s=began_s, end_s=time.time(), tokens=opened.num_tokens)

    async def _send_samples(self, request: pb.GenerateRequest, opened: _Open, max_request_s: float) -> None:
        parts = self._gate.parts_for_new_work()
        wanted = self._checked(request, parts)
        deadline_s = min(request.deadline_ms / 1000 or math.inf, max_request_s)
        with parts.scheduler.answering(wanted) as answers, _deadline(answers, deadline_s):
            opened.answers = answers
            async for index, sample in answers:
                if opened.is_aborted:
                    return
                opened.num_tokens += sample.num_tokens
                message = rollout_codec.sample_to_wire(index, sample, wanted.prompt_ids, wanted.images)
                await self._replies.write(pb.GenerateReply(request_id=request.request_id, sample=message))

    def _checked(self, request: pb.GenerateRequest, parts: Parts) -> SampleRequest:
        if len(self._open) > _MAX_OPEN_REQUESTS:
            raise Unavailable(f"the stream has more than {_MAX_OPEN_REQUESTS} requests without an answer")
        model = parts.model
        admission.check_model(request.architecture_fingerprint, request.min_weight_version, model)
        wanted = SampleRequest(
            session=self._session,
            job=self._job,
            prompt_ids=codec.int32_from_wire(request.prompt_ids, "token id"),
            num_samples=request.num_samples,
            sampling=rollout_codec.sampling_from_wire(request.sampling),
            seed=request.seed if request.HasField("seed") else None,
            images=codec.images_from_wire(request.images),
        )
        admission.check_request(wanted, model)
        if parts.images is None:
            return wanted
        return replace(wanted, images=parts.images.resolved_prompt(wanted.prompt_ids, wanted.images))


@contextmanager
def _deadline(answers: Answers, deadline_s: float) -> Iterator[None]:
    """Fail the answers after that time. No cancellation: it could hit a reply being written, and end the stream."""
    late = DeadlineExpired(f"the last sample was not finished within {deadline_s:g} s")
    timer = asyncio.get_running_loop().call_later(deadline_s, answers.fail, late)
    try:
        yield
    finally:
        timer.cancel()


def _job(context: Context) -> str:
    """The caller's name; what the client calls its job where nobody asks who it is. Raises InvalidRequest."""
    if name := caller_name():
        return name
    name = rollout_codec.job_from_metadata(dict(context.invocation_metadata() or ()))
    check_name(name)
    return name
