"""Answers the rpcs of teacher.proto."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc

from kdmesh.errors import EngineFailure, HandleGone, InvalidRequest, ModelMismatch, RpcError
from kdmesh.handles.slab.store import SlabStore
from kdmesh.images import ImagesMissing
from kdmesh.rpc import codec, failure
from kdmesh.rpc.caller import caller_name
from kdmesh.rpc.reply_stream import ReplyStream
from kdmesh.rpc.teachers import raw_chunk, row_chunks
from kdmesh.rpc.teachers.row_client import Client
from kdmesh.serving.engine import sleep_rpcs
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.jobs.table import check_name
from kdmesh.serving.outstanding import Outstanding
from kdmesh.tracing import spans
from kdmesh.v1 import common_pb2, weights_pb2
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherServicer
from kdmesh_teacher import admission
from kdmesh_teacher.metrics import Metrics
from kdmesh_teacher.parts import Parts
from kdmesh_teacher.work import Answer

log = logging.getLogger(__name__)

# Open requests of one stream; more are not read until some are answered.
_MAX_OPEN_REQUESTS = 1024
# Handles of one Release, which holds up everybody's calls; a slab has at most 4096 slots.
_MAX_RELEASED = 8192
_NO_SESSION = b""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Servicer(TeacherServicer):
    """The gRPC surface: checks what comes in, asks the parts, answers; the error boundary is outside.

    The streaming methods write to their context instead of yielding, which grpc.aio allows and
    the generated types do not know.
    """

    def __init__(self, gate: Gate[Parts], metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics
        self.outstanding = Outstanding()
        """Requests that have come in and reads that have begun, until they are answered."""

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """See teacher.proto."""
        return codec.description_to_wire(self._gate.parts_for_new_clients().model)

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        """See teacher.proto."""
        parts = self._gate.parts_for_new_clients()
        if request.model_fingerprint:
            admission.check_model(request.model_fingerprint, parts.model.model_fingerprint)
        store, job = parts.store, caller_name() or request.job
        check_name(job)
        return pb.OpenSessionResponse(
            session=store.open_session(job),
            lease_ms=_ms(store.limits.lease_s),
            claim_ms=_ms(store.limits.claim_s),
            max_slots=min(store.limits.slots, store.limits.slots_per_session),
            broker_socket=str(store.socket_path),
            node_nonce=store.nonce,
            has_rdma=parts.rdma is not None,
            groups=() if parts.carrier is None else parts.carrier.offered,
        )

    async def KeepAlive(self, request: pb.KeepAliveRequest, context: Context) -> pb.KeepAliveResponse:
        """See teacher.proto."""
        parts = self._gate.parts()
        _job(parts.store, request.session)
        parts.store.keep_alive(request.session)
        return pb.KeepAliveResponse(load=codec.load_to_wire(parts.scheduler.load))

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        """See teacher.proto."""
        store = self._gate.parts().store
        with suppress(HandleGone):
            _job(store, request.session)
            store.close_session(request.session)
        return pb.CloseSessionResponse()

    async def Prefill(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.PrefillRequest], context: Context
    ) -> None:
        """See teacher.proto."""
        parts = self._gate.parts()
        stream = ReplyStream(context)
        may_read = asyncio.Semaphore(_MAX_OPEN_REQUESTS)
        async with stream, asyncio.TaskGroup() as requests:
            async for request in request_iterator:
                job = _job(parts.store, request.session)
                await may_read.acquire()
                task = requests.create_task(self._reply(request, job, parts, stream))
                task.add_done_callback(lambda _: may_read.release())

    async def _reply(self, request: pb.PrefillRequest, job: str, parts: Parts, stream: ReplyStream) -> None:
        """Answer one request of a stream. Raises HandleGone, which ends the stream, when its session has ended."""
        outcome = "cancelled"
        with self.outstanding:
            try:
                answer = await self._traced(request, job, parts)
                outcome = "ok"
            except HandleGone:
                outcome = HandleGone.__name__
                raise
            except ImagesMissing as error:
                outcome = ImagesMissing.__name__
                missing = common_pb2.MissingImages(digests=error.digests)
                load = codec.load_to_wire(parts.scheduler.load)
                await stream.write(pb.PrefillReply(request_id=request.request_id, missing_images=missing, load=load))
                return
            except RpcError as error:
                outcome = type(error).__name__
                if isinstance(error, EngineFailure):
                    facts = {"job": job, "request_id": request.request_id, "session": request.session.hex()[:8]}
                    log.warning("request failed", extra={**facts, "reason": str(error)})
                refusal = failure.to_wire(error)
                load = codec.load_to_wire(parts.scheduler.load)
                await stream.write(pb.PrefillReply(request_id=request.request_id, failure=refusal, load=load))
                return
            finally:
                self._metrics.request_done(job, outcome)
            result, load = _result(answer), codec.load_to_wire(parts.scheduler.load)
            try:
                await stream.write(pb.PrefillReply(request_id=request.request_id, result=result, load=load))
            except BaseException:
                parts.store.release(request.session, answer.rows)  # nobody will ever know of it
                raise

    async def _traced(self, request: pb.PrefillRequest, job: str, parts: Parts) -> Answer:
        """The answer, with spans of what it waited for."""
        with spans.span("prefill request", parent=request.traceparent, job=job, request_id=request.request_id):
            began_s = time.time()
            answer = await self._prefill(request, job, parts)
            started_s = began_s + answer.queue_s
            spans.record("queue", begin_s=began_s, end_s=started_s)
            spans.record("prefill", begin_s=started_s, end_s=started_s + answer.engine_s, rows=answer.rows.rows)
            return answer

    async def _prefill(self, request: pb.PrefillRequest, job: str, parts: Parts) -> Answer:
        self._gate.parts_for_new_work()
        model = parts.model
        admission.check_model(request.model_fingerprint, model.model_fingerprint)
        admission.check_version(request.weight_version, model.weight_version)
        admission.check_number(len(request.sequences), model)
        admission.check_layers(request.layers, model)
        layers = tuple(request.layers)
        sequences = codec.sequences_from_wire(request.sequences)
        admission.check_sequences(sequences, model, layers)
        if parts.images is not None:
            sequences = parts.images.resolved(sequences)
        deadline_s = request.deadline_ms / 1000 or math.inf
        return await parts.scheduler.prefill(
            request.session,
            job,
            sequences,
            layers=layers,
            weight_version=request.weight_version,
            uses_cache=not request.bypasses_cache,
            deadline_s=deadline_s,
            may_begin_again=self._gate.parts_for_new_work,
        )

    async def PutImages(self, request: common_pb2.PutImagesRequest, context: Context) -> common_pb2.PutImagesResponse:
        """See teacher.proto."""
        parts = self._gate.parts()
        _job(parts.store, request.session)
        if parts.images is None:
            raise InvalidRequest(f"teacher {parts.model.name} reads no images")
        await parts.images.put(request.images)
        return common_pb2.PutImagesResponse()

    async def FindCached(self, request: pb.FindCachedRequest, context: Context) -> pb.FindCachedResponse:
        """See teacher.proto."""
        parts = self._gate.parts()
        job, model = _job(parts.store, request.session), parts.model
        admission.check_model(request.model_fingerprint, model.model_fingerprint)
        admission.check_version(request.weight_version, model.weight_version)
        admission.check_number(len(request.sequences), model)
        admission.check_layers(request.layers, model)
        sequences = codec.sequences_from_wire(request.sequences)
        return codec.cache_answer_to_wire(parts.find_cached(job, model.weight_version, sequences, request.layers))

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        """See teacher.proto."""
        store = self._gate.parts().store
        _job(store, request.session)
        if (count := len(request.handles)) > _MAX_RELEASED:
            raise InvalidRequest(f"{count} handles are released at once; the most allowed are {_MAX_RELEASED}")
        handles = [codec.handle_from_wire(m) for m in request.handles]
        gone = [index for index, handle in enumerate(handles) if not store.release(request.session, handle)]
        if request.by_rdma:
            self._metrics.sent(
                "rdma", sum(handle.size_bytes for index, handle in enumerate(handles) if index not in gone)
            )
        return pb.ReleaseResponse(gone=gone)

    async def LocateMemory(self, request: pb.LocateMemoryRequest, context: Context) -> pb.LocateMemoryResponse:
        """See teacher.proto."""
        parts = self._gate.parts()
        _job(parts.store, request.session)
        if parts.rdma is None:
            raise ModelMismatch("this server has no RDMA; server.rdma is off")
        if request.HasField("handle"):
            segment, handle = parts.store.find(request.session, codec.handle_from_wire(request.handle))
            parts.store.told(handle)
            return codec.memory_to_wire(await parts.rdma.locate(segment))
        return codec.memory_to_wire(await parts.rdma.probe())

    async def GetHead(self, request: pb.GetHeadRequest, context: Context) -> pb.GetHeadResponse:
        """See teacher.proto."""
        parts = self._gate.parts()
        served = parts.scheduler.weights
        _job(parts.store, request.session)
        parts.store.lend(request.session, served.head)
        weight, *bias = map(codec.handle_to_wire, served.head)
        return pb.GetHeadResponse(
            head=codec.head_to_wire(parts.model.head),
            weight_version=served.version,
            weight=weight,
            bias=bias[0] if bias else None,
        )

    async def ReadHandle(  # type: ignore[override]
        self, request: pb.ReadHandleRequest, context: Context
    ) -> None:
        """See teacher.proto."""
        store = self._gate.parts().store
        _job(store, request.session)
        handle = codec.handle_from_wire(request.handle)
        with self.outstanding, store.reading(request.session, handle) as data:
            start = 0
            async for part in row_chunks.chunks(data, handle, as_fp8=request.as_fp8):
                if not store.is_open(request.session):
                    raise HandleGone("the session ended while the handle was read")
                # A reader that stops reading must not keep the slot.
                try:
                    async with asyncio.timeout(store.limits.lease_s):
                        await context.write(raw_chunk.encode(part, offset_bytes=start))
                except TimeoutError:
                    raise HandleGone(f"nothing was read for {store.limits.lease_s:g} s") from None
                start += len(part)
                self._metrics.sent("stream", len(part))

    async def CarryRows(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.CarryRowsRequest], context: Context
    ) -> None:
        """See teacher.proto."""
        parts = self._gate.parts()
        if parts.carrier is None:
            raise InvalidRequest("this server makes no groups; its server.groups is false")
        client = Client(
            host=_host(context.peer()),
            check=partial(_job, parts.store),
            busy=self.outstanding,
            sent=partial(self._metrics.sent, "collective"),
        )
        async with aclosing(parts.carrier.answer(request_iterator, client)) as replies:
            async for reply in replies:
                await context.write(reply)

    async def Sleep(self, request: common_pb2.SleepRequest, context: Context) -> common_pb2.SleepResponse:
        """See teacher.proto."""
        return await sleep_rpcs.answer_sleep(self._gate.parts().sleep, request)

    async def Wake(self, request: common_pb2.WakeRequest, context: Context) -> common_pb2.WakeResponse:
        """See teacher.proto."""
        return await sleep_rpcs.answer_wake(self._gate.parts().sleep, request)

    async def UpdateWeights(  # type: ignore[override]
        self, request_iterator: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: Context
    ) -> None:
        """See teacher.proto."""
        parts = self._gate.parts_for_new_clients()
        if parts.updates is None:
            raise ModelMismatch(
                f"the weights of teacher {parts.model.name} are frozen: only an engine that is configured with "
                "engine.updatable takes new ones"
            )
        parts.sleep.require_weights()
        async with parts.updating.receiving(), aclosing(parts.updates.answer(request_iterator)) as replies:
            async for reply in replies:
                await context.write(reply)


def _job(store: SlabStore, session: bytes) -> str:
    """The job of the caller's session. Raises HandleGone when it has ended, or is another caller's."""
    job = store.job(session)
    return job if caller_name() in ("", job) else store.job(_NO_SESSION)  # as of one that never was


def _host(peer: str) -> str:
    """The address in gRPC's name of a caller, as `ipv4:10.0.0.1:50` or `ipv6:%5B::1%5D:50`."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


def _result(answer: Answer) -> pb.PrefillResult:
    return pb.PrefillResult(
        rows=codec.handle_to_wire(answer.rows),
        digest=answer.digest,
        weight_version=answer.weight_version,
        queue_ms=_ms(answer.queue_s),
        engine_ms=_ms(answer.engine_s),
    )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
