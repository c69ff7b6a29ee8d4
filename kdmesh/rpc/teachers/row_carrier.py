"""The server's end of the private groups through which rows go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from kdmesh.errors import HandleGone, InvalidRequest, Unavailable
from kdmesh.groups.meeting import JOIN_S, Meeting, address_towards
from kdmesh.groups.pair_channel import PairChannel
from kdmesh.groups.pair_group import Backend, PairGroup, Seat
from kdmesh.handles.slab.store import SlabStore
from kdmesh.rpc import codec, group_codec
from kdmesh.rpc.teachers.row_client import Client
from kdmesh.rpc.teachers.row_pieces import Checksum, pieces
from kdmesh.types import Handle
from kdmesh.v1 import teacher_pb2 as pb

_MAX_GROUPS = 2  # of a session: one, and one that takes its place while it ends


class RowCarrier:
    """Makes a group for each stream, with a thread that sends; belongs to one event loop.

    A client that does not receive keeps its own thread and one of its slots until a piece is overdue. Whatever goes
    wrong ends that client's stream and group, and nothing else.

    Attributes:
        backends: what groups can be made of here, the best first.
        offered: the same on the wire.
    """

    def __init__(self, store: SlabStore, gpu: torch.device | None) -> None:
        """
        Args:
            store: whose rows go.
            gpu: a device of this process, for NCCL; None where it has none.
        """
        has_nccl = gpu is not None and dist.is_nccl_available()
        self.backends = (Backend.NCCL, Backend.GLOO) if has_nccl else (Backend.GLOO,)
        self.offered = group_codec.backends_to_wire(self.backends)
        self._store = store
        self._gpu = gpu
        self._meetings: dict[str, Meeting] = {}  # by this machine's address
        self._groups: Counter[bytes] = Counter()  # by session
        self._lock = asyncio.Lock()

    async def answer(
        self, requests: AsyncIterator[pb.CarryRowsRequest], client: Client
    ) -> AsyncGenerator[pb.CarryRowsReply, None]:
        """The replies to one CarryRows stream. Raises RpcError as teacher.proto says."""
        begin = (await self._next(requests, "begin", session=None)).begin
        client.check(begin.session)
        host = address_towards(client.host)
        backend = self._best(group_codec.backends_from_wire(begin.backends))
        with self._counted(begin.session):
            meeting = await self._meeting(host)
            place, invitation = await asyncio.to_thread(meeting.invite)
            device = self._gpu if backend is Backend.NCCL and self._gpu is not None else torch.device("cpu")
            seat = Seat(store=place, secret=invitation.secret, rank=0, backend=backend, device=device, host=host)
            channel = PairChannel(partial(PairGroup, seat, timeout_s=JOIN_S))
            try:
                yield pb.CarryRowsReply(join=group_codec.ask_into_group(backend, invitation))
                await channel.joined()
                while True:
                    request = await self._next(requests, "handle", session=begin.session)
                    with client.busy:
                        checksum = await self._send(channel, begin.session, codec.handle_from_wire(request.handle))
                        client.sent(checksum.size_bytes)
                        yield pb.CarryRowsReply(carried=pb.CarriedRows(checksum=checksum.value))
            finally:
                await channel.close()
                await asyncio.to_thread(meeting.forget, invitation)

    async def _send(self, channel: PairChannel, session: bytes, handle: Handle) -> _Sent:
        checksum = Checksum()
        with self._store.reading(session, handle) as data:
            for piece in pieces(data):
                if not self._store.is_open(session):
                    raise HandleGone("the session ended while its rows were sent")
                checksum.update(piece)
                with piece:
                    await channel.send(piece, self._store.limits.lease_s)
            return _Sent(size_bytes=len(data), value=checksum.intdigest())

    def _best(self, offered: tuple[Backend, ...]) -> Backend:
        for backend in self.backends:
            if backend in offered:
                return backend
        ours, theirs = ", ".join(self.backends), ", ".join(offered) or "none"
        raise InvalidRequest(f"a group over {theirs}; this server makes groups over {ours}")

    async def _meeting(self, host: str) -> Meeting:
        async with self._lock:
            if host not in self._meetings:
                self._meetings[host] = await asyncio.to_thread(Meeting, host, timeout_s=JOIN_S)
            return self._meetings[host]

    @contextmanager
    def _counted(self, session: bytes) -> Iterator[None]:
        if self._groups[session] >= _MAX_GROUPS:
            raise Unavailable(f"the session has {_MAX_GROUPS} groups, which end before it gets another")
        self._groups[session] += 1
        try:
            yield
        finally:
            self._groups[session] -= 1
            if not self._groups[session]:
                del self._groups[session]

    async def _next(
        self, requests: AsyncIterator[pb.CarryRowsRequest], wanted: str, *, session: bytes | None
    ) -> pb.CarryRowsRequest:
        """The next request. Raises HandleGone when the session ends before it comes."""
        coming = asyncio.ensure_future(anext(requests, None))
        try:
            while not (await asyncio.wait((coming,), timeout=self._store.limits.lease_s))[0]:
                if session is None or not self._store.is_open(session):
                    raise HandleGone("the session has ended, or never began")
        finally:
            coming.cancel()
        request = coming.result()
        if request is None:
            raise Unavailable("the client has left the group")
        if request.WhichOneof("step") != wanted:
            raise InvalidRequest(f"the stream says {request.WhichOneof('step') or 'nothing'} where {wanted} comes next")
        return request


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    size_bytes: int
    value: int
