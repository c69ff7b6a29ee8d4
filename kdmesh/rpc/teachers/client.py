"""An open session with one teacher server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
from torch import Tensor

from kdmesh.errors import (
    ConfigError,
    EngineFailure,
    HandleGone,
    InvalidRequest,
    RpcError,
    Unauthenticated,
    Unavailable,
)
from kdmesh.groups.pair_group import Backend
from kdmesh.handles.doors.door import Door
from kdmesh.handles.rdma.agent import RemoteMemory
from kdmesh.losses.head import OutputHead
from kdmesh.rpc import codec
from kdmesh.rpc.background_tasks import BackgroundTasks
from kdmesh.rpc.calls import UNARY_TIMEOUT_S, our_errors
from kdmesh.rpc.missing_images import with_images
from kdmesh.rpc.retry import Deadline, RetryPolicy
from kdmesh.rpc.server_client import ServerClient
from kdmesh.rpc.teachers import raw_chunk
from kdmesh.rpc.teachers.checked_answer import checked_handle
from kdmesh.rpc.teachers.doors import Doorway, open_door
from kdmesh.rpc.teachers.prefill_stream import PrefillStream
from kdmesh.rpc.teachers.row_group import Membership, RowGroup
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.tracing import spans
from kdmesh.types import CacheAnswer, Handle, ModelDescription, ServerLoad, TokenSequence
from kdmesh.v1 import common_pb2
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh.v1.teacher_pb2_grpc import TeacherStub

if TYPE_CHECKING:
    from kdmesh.v1.teacher_pb2_grpc import TeacherAsyncStub

T = TypeVar("T")

_CLOSE_S = 2.0  # for a farewell; without it, the session ends with its lease
_RELEASE_AGAIN = RetryPolicy()
_READ_HANDLE = "/kdmesh.v1.Teacher/ReadHandle"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherRows:
    """Hidden states of a request's positions, in its order. Never write to them."""

    rows_RD: Tensor  # [R, D] on the CPU, in the teacher's dtype; with the outputs of n layers [R, (1 + n) D]
    weight_version: int
    is_borrowed: bool  # the memory is a slot of the teacher's slab, which is short


class TeacherClient(ServerClient):
    """Keeps its session alive by itself; when it cannot, it is lost for good, and another must be connected.

    Belongs to the event loop that connected it. The slot under rows that came through shared
    memory is the server's again when the last view of them dies.

    Attributes:
        address: host:port.
        model: what the server said of itself.
        max_requests: most answers that the server lets this session hold at once.
        door: through which rows come.
        door_reason: why through that one.
    """

    model: ModelDescription
    max_requests: int
    door: Door
    door_reason: str
    _stub: TeacherAsyncStub

    def __init__(self, address: str, options: SessionOptions, on_load: Callable[[ServerLoad], None]) -> None:
        """Use `connect`."""
        super().__init__(address, options.access)
        self._options = options
        self._on_load = on_load
        self._stub = TeacherStub(self._channel)
        # The generated stub would parse each chunk, which copies it once more.
        self._read_handle: grpc.aio.UnaryStreamMultiCallable[pb.ReadHandleRequest, bytes] = self._channel.unary_stream(
            _READ_HANDLE, request_serializer=pb.ReadHandleRequest.SerializeToString
        )
        self._tasks = BackgroundTasks()
        self._head: Handle | None = None  # to the weight of the head that was fetched last

    @classmethod
    async def connect(
        cls,
        address: str,
        options: SessionOptions,
        *,
        model_fingerprint: str = "",
        on_load: Callable[[ServerLoad], None] = lambda load: None,
    ) -> Self:
        """Open a session. One attempt: a server that is not there or still loads is Unavailable.

        Args:
            address: host:port.
            options: how to get in, and how rows shall come.
            model_fingerprint: refuse a server with another model; empty accepts any.
            on_load: called with what the server has to do, whenever it says so.

        Raises:
            Unavailable: not reachable, loading or draining.
            ModelMismatch: another model is served there.
            Unauthenticated, PermissionDenied: the server does not let this job in.
            ConfigError: the door named does not lead to the server from here; the access cannot be used; or
                another kind of server answers there.
            EngineFailure: something else answers there.
        """
        client = cls(address, options, on_load)
        try:
            await client._open(model_fingerprint)
        except BaseException:
            await client.close()
            raise
        return client

    async def _open(self, model_fingerprint: str) -> None:
        with our_errors(self.address, wanted="teacher server"):
            described = await self._stub.Describe(pb.DescribeRequest(), timeout=UNARY_TIMEOUT_S)
        try:
            self.model = codec.description_from_wire(described)
        except InvalidRequest as error:
            raise EngineFailure(f"{self.address} describes an impossible model: {error}") from None
        wanted = model_fingerprint or self.model.model_fingerprint
        request = pb.OpenSessionRequest(job=self._options.job, model_fingerprint=wanted)
        opened = await self._call(self._stub.OpenSession, request)
        self._session, self.max_requests = opened.session, opened.max_slots
        self._lease_s = opened.lease_ms / 1000
        self._closing.push_async_callback(self._close_session)
        self._closing.push_async_callback(self._tasks.close)
        await self._open_door(opened)
        self._closing.callback(self.door.close)
        self._closing.callback(self._exact.close)
        self._stream = PrefillStream(
            self._stub, self.address, on_orphan=self._release_orphan, on_load=self._on_load, on_end=self._lose
        )
        self._closing.push_async_callback(self._stream.close)
        self._tasks.start(self._keep_alive())

    async def _open_door(self, opened: pb.OpenSessionResponse) -> None:
        choice = self._options.door
        way = Doorway(
            opened=opened,
            read=self._read,
            read_fp8=partial(self._read, as_fp8=True) if self._options.wire == "fp8" else None,
            release=self._release,
            end=self._end,
            locate=self._locate,
            lose=self._lose,
            join=self._join_group,
            has_gpu=self._options.gpu is not None,
        )
        try:
            chosen = await open_door(choice, way, address=self.address)
        except Unavailable as error:
            if (choice == "collective" and opened.groups) or (choice == "rdma" and opened.has_rdma):
                raise  # it may work the next time
            # Is it the door, or has the whole server gone in this moment?
            await self._call(self._stub.KeepAlive, pb.KeepAliveRequest(session=self._session))
            raise ConfigError(f"door {choice}, but {self.address} is not to be had that way: {error}") from None
        self.door, self._exact, self.door_reason = chosen.door, chosen.exact, chosen.reason

    async def prefill(
        self,
        sequences: Sequence[TokenSequence],
        deadline: Deadline,
        *,
        layers: Sequence[int] = (),
        weight_version: int = 0,
        uses_cache: bool = True,
    ) -> TeacherRows:
        """The rows of a request that the server's limits allow, by the weights of that version; 0 takes any.

        Args:
            layers: whose outputs are to follow the final hidden state in every row, ascending, from 1 to
                model.num_layers.
            uses_cache: whether the server may keep them for the next time.

        Raises:
            RpcError: as teacher.proto says of Prefill, PutImages and ReadHandle.
            EngineFailure: the answer is not one to this request.
        """

        async def ask() -> pb.PrefillResult:
            return await self._stream.ask(
                self._session,
                sequences,
                model_fingerprint=self.model.model_fingerprint,
                layers=layers,
                weight_version=weight_version,
                uses_cache=uses_cache,
                deadline_s=deadline.left_s,
            )

        with spans.span("rows", address=self.address, sequences=len(sequences)):
            images = [placed for sequence in sequences for placed in sequence.images]
            result = await with_images(ask, lambda lacked: self._put_images(lacked, deadline), images)
            return await self._fetch(result, sequences, layers)

    async def _fetch(
        self, result: pb.PrefillResult, sequences: Sequence[TokenSequence], layers: Sequence[int]
    ) -> TeacherRows:
        try:
            handle = checked_handle(result, sequences, self.model, self.address, layers=layers)
        except EngineFailure:
            self._release_orphan(result.rows)
            raise
        with spans.span("handle", door=self.door.name, rows=handle.rows):
            rows_RD = await self.door.fetch(handle)
        return TeacherRows(rows_RD=rows_RD, weight_version=result.weight_version, is_borrowed=self.door.name == "shm")

    async def find_cached(
        self, sequences: Sequence[TokenSequence], *, layers: Sequence[int] = (), weight_version: int
    ) -> CacheAnswer:
        """Which of these sequences' rows the server has kept; no more than one request may hold.

        Raises:
            RpcError: as teacher.proto says.
        """
        request = pb.FindCachedRequest(
            session=self._session,
            sequences=codec.sequences_to_wire(sequences),
            layers=layers,
            model_fingerprint=self.model.model_fingerprint,
            weight_version=weight_version,
        )
        answer = await self._call(self._stub.FindCached, request)
        try:
            return codec.cache_answer_from_wire(answer, num_sequences=len(sequences))
        except InvalidRequest as error:
            raise EngineFailure(f"{self.address} sent {error}") from None

    async def head(self) -> tuple[OutputHead, int]:
        """The output head over the padded vocabulary, and its weight version. Over shared memory it is not copied."""
        answer = await self._call(self._stub.GetHead, pb.GetHeadRequest(session=self._session))
        spec = codec.head_from_wire(answer.head)
        weight = codec.handle_from_wire(answer.weight)
        if self._head is not None and self._head.segment != weight.segment:
            self._exact.forget(self._head)
        self._head = weight
        weight_VD = await self._exact.fetch(weight)
        bias_1V = await self._exact.fetch(codec.handle_from_wire(answer.bias)) if spec.has_bias else None
        head = OutputHead(
            weight_VD=weight_VD,
            bias_V=None if bias_1V is None else bias_1V[0],
            logit_scale=spec.logit_scale,
            logit_softcap=spec.logit_softcap,
        )
        return head, answer.weight_version

    @property
    def is_local(self) -> bool:
        """Whether rows come through this node's memory."""
        return self.door.name == "shm"

    async def ask_load(self) -> ServerLoad:
        """What the server has to do now. Raises Unavailable when it is not there."""
        return await self._extend_lease(UNARY_TIMEOUT_S)

    # Inside

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: object, timeout_s: float = UNARY_TIMEOUT_S
    ) -> T:
        with our_errors(self.address):
            return await method(request, timeout=timeout_s)

    async def _put_images(self, images: Sequence[bytes], deadline: Deadline) -> None:
        request = common_pb2.PutImagesRequest(session=self._session, images=images)
        await self._call(self._stub.PutImages, request, deadline.left_s)

    async def _keep_alive(self) -> None:
        """Does not depend on anybody's loop over steps: a slow step must not cost the session."""
        heard_s = time.monotonic()
        while True:
            await asyncio.sleep(self._lease_s / 6)
            try:
                self._on_load(await self._extend_lease(min(UNARY_TIMEOUT_S, self._lease_s / 3)))
                heard_s = time.monotonic()
            except Unavailable as error:
                if time.monotonic() - heard_s > self._lease_s / 2:
                    self._lose(error)
                    return
            except RpcError:
                return

    async def _extend_lease(self, timeout_s: float) -> ServerLoad:
        """What the server has to do, as it says then. Lost is this client when the session is."""
        try:
            answer = await self._call(self._stub.KeepAlive, pb.KeepAliveRequest(session=self._session), timeout_s)
        except RpcError as error:
            if not isinstance(error, Unavailable):
                self._lose(error)
            raise
        return codec.load_from_wire(answer.load)

    async def _read(self, handle: Handle, *, as_fp8: bool = False) -> AsyncIterator[memoryview]:
        """The chunks of a handle, for the stream doors."""
        request = pb.ReadHandleRequest(session=self._session, handle=codec.handle_to_wire(handle), as_fp8=as_fp8)
        with our_errors(self.address):
            call = self._read_handle(request)
            offset_bytes = 0
            try:
                async for message in call:
                    data = self._chunk(message, offset_bytes)
                    offset_bytes += len(data)
                    yield data
            finally:
                call.cancel()

    async def _join_group(self, backends: tuple[Backend, ...]) -> RowGroup:
        """For the collective door."""
        return await RowGroup.join(
            Membership(
                carry=lambda: self._stub.CarryRows(),
                address=self.address,
                session=self._session,
                backends=backends,
                gpu=self._options.gpu,
                piece_s=self._lease_s,
                run=self._tasks.start,
            )
        )

    def _chunk(self, message: bytes, offset_bytes: int) -> memoryview:
        try:
            return raw_chunk.decode(message, offset_bytes=offset_bytes)
        except InvalidRequest as error:
            raise EngineFailure(f"{self.address} sent {error}") from None

    async def _locate(self, handle: Handle | None) -> RemoteMemory:
        """Where a handle's segment lies, for the RDMA door."""
        named = None if handle is None else codec.handle_to_wire(handle)
        request = pb.LocateMemoryRequest(session=self._session, handle=named)
        return codec.memory_from_wire(await self._call(self._stub.LocateMemory, request))

    async def _end(self, handle: Handle) -> None:
        """Release a handle that was read by RDMA. Raises HandleGone when it had ended before."""
        request = pb.ReleaseRequest(session=self._session, handles=[codec.handle_to_wire(handle)], by_rdma=True)
        if (await self._call(self._stub.Release, request)).gone:
            raise HandleGone(f"the handle to segment {handle.segment} ended while it was read")

    def _release(self, handle: Handle) -> None:
        self._tasks.start(self._send_release(codec.handle_to_wire(handle)))

    def _release_orphan(self, handle: common_pb2.Handle) -> None:
        self._tasks.start(self._send_release(handle))

    async def _send_release(self, handle: common_pb2.Handle) -> None:
        """Until the server has heard it: a slot whose release is lost is this session's until that ends."""
        for attempt in itertools.count():
            try:
                await self._call(self._stub.Release, pb.ReleaseRequest(session=self._session, handles=[handle]))
            except (Unavailable, Unauthenticated):  # a token may be exchanged at any time
                await asyncio.sleep(_RELEASE_AGAIN.wait_s(attempt))
            except RpcError:  # the session has ended
                return
            else:
                return

    async def _close_session(self) -> None:
        with contextlib.suppress(RpcError):
            await self._call(self._stub.CloseSession, pb.CloseSessionRequest(session=self._session), _CLOSE_S)
