"""The client's end of a private group through which rows come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import grpc
import torch

from kdmesh.errors import EngineFailure, InvalidRequest, Unavailable
from kdmesh.groups.meeting import JOIN_S, reach
from kdmesh.groups.pair_channel import PairChannel
from kdmesh.groups.pair_group import Backend, PairGroup, Seat
from kdmesh.rpc import codec, group_codec
from kdmesh.rpc.ordered_stream import OrderedStream
from kdmesh.rpc.teachers.row_pieces import Checksum, pieces
from kdmesh.types import Handle
from kdmesh.v1 import teacher_pb2 as pb

_REASON_S = 5.0  # after a group broke; whatever broke it ends the stream too, and says more

_Stream: TypeAlias = "OrderedStream[pb.CarryRowsRequest, pb.CarryRowsReply]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who joins a group, and with what.

    Attributes:
        carry: begins a CarryRows call.
        address: the server's.
        session: whose rows come.
        backends: those that will do.
        gpu: where bytes go on their way through NCCL.
        piece_s: longest time for one piece to come.
        run: runs what must go on after the group was left.
    """

    carry: Callable[[], grpc.aio.StreamStreamCall[pb.CarryRowsRequest, pb.CarryRowsReply]]
    address: str
    session: bytes
    backends: tuple[Backend, ...]
    gpu: torch.device | None
    piece_s: float
    run: Callable[[Coroutine[Any, Any, None]], object]


class RowGroup:
    """Belongs to the event loop that joined it; see kdmesh.handles.doors.collective.Group."""

    def __init__(self, stream: _Stream, channel: PairChannel, member: Membership) -> None:
        """Use `join`."""
        self._stream = stream
        self._channel = channel
        self._member = member
        self._is_left = asyncio.Event()
        member.run(self._until_left())

    @classmethod
    async def join(cls, member: Membership) -> Self:
        """Make a group with the server.

        Raises:
            RpcError: as teacher.proto says of CarryRows.
            Unavailable: also when the two cannot reach each other.
        """
        stream: _Stream = OrderedStream(member.carry(), member.address)
        try:
            channel = await _join(stream, member)
        except BaseException:
            await stream.close()
            raise
        return cls(stream, channel, member)

    async def receive(self, handle: Handle, place: memoryview) -> None:
        """See Group."""
        answer = self._stream.send(pb.CarryRowsRequest(handle=codec.handle_to_wire(handle)))
        answer.add_done_callback(self._answered)
        checksum = Checksum()
        for piece in pieces(place):
            try:
                await self._channel.receive(torch.frombuffer(piece, dtype=torch.uint8), self._member.piece_s)
            except Unavailable:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REASON_S):
                        await answer
                raise
            checksum.update(piece)
        reply = await answer
        if reply.carried.checksum != checksum.intdigest():
            raise Unavailable(f"{len(place)} bytes came with a wrong checksum", retry_after_s=0.0)

    def leave(self) -> None:
        """See Group."""
        self._channel.abort()
        self._is_left.set()

    def _answered(self, answer: asyncio.Future[pb.CarryRowsReply]) -> None:
        """Nobody sends any more when the stream has ended."""
        if answer.cancelled() or answer.exception() is not None:
            self._channel.abort()

    async def _until_left(self) -> None:
        try:
            await self._is_left.wait()
        finally:
            await self._channel.close()
            await self._stream.close()


async def _join(stream: _Stream, member: Membership) -> PairChannel:
    begin = pb.BeginCarrying(session=member.session, backends=group_codec.backends_to_wire(member.backends))
    try:
        async with asyncio.timeout(JOIN_S):
            reply = await stream.send(pb.CarryRowsRequest(begin=begin))
    except TimeoutError:
        raise Unavailable(f"{member.address} made no group within {JOIN_S:g} s") from None
    try:
        backend, invitation = group_codec.asked_into_group(reply.join)
    except InvalidRequest as error:
        raise EngineFailure(f"{member.address} asks into no group: {error}") from None
    if backend not in member.backends:
        raise EngineFailure(f"{member.address} takes {backend}, which was not offered")
    store, host = await asyncio.to_thread(reach, invitation)
    device = member.gpu if backend is Backend.NCCL and member.gpu is not None else torch.device("cpu")
    seat = Seat(store=store, secret=invitation.secret, rank=1, backend=backend, device=device, host=host)
    channel = PairChannel(partial(PairGroup, seat, timeout_s=JOIN_S))
    try:
        await channel.joined()
    except BaseException:
        await channel.close()
        raise
    return channel
