"""The server's end of the door that an update's bytes come through."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import Self, assert_never

import torch
from torch import Tensor

from kdmesh.errors import EngineFailure, InvalidRequest, Unavailable
from kdmesh.groups.meeting import JOIN_S, reach
from kdmesh.groups.pair_channel import PairChannel
from kdmesh.groups.pair_group import Backend, PairGroup, Seat
from kdmesh.handles.doors.shm import ShmDoor
from kdmesh.rpc import codec
from kdmesh.rpc.weights import codec as weight_codec
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.weights.doors import GROUPS, Door

log = logging.getLogger(__name__)


class BucketSource:
    """Gives the bytes of buckets, one bucket at a time. Belongs to one event loop.

    Attributes:
        door: what was taken; INLINE is there always.
    """

    def __init__(self, device: torch.device | None, silence_s: float) -> None:
        """Use `open`."""
        self.door = Door.INLINE
        self._device = device
        self._silence_s = silence_s
        self._shm: ShmDoor | None = None
        self._channel: PairChannel | None = None
        self._received = torch.empty(0, dtype=torch.uint8)  # one bucket, reused

    @classmethod
    async def open(cls, begin: pb.BeginUpdate, *, device: torch.device | None, silence_s: float) -> Self:
        """Take the first door of those offered that can be used.

        Args:
            begin: says which.
            device: the GPU that bytes may come to; None where there is none.
            silence_s: how long a sender may let this side wait for bytes that it has announced.

        Raises:
            HandleGone: the session of shared memory has ended.
            InvalidRequest: a door is none.
        """
        source = cls(device, silence_s)
        for door in [weight_codec.DOORS.from_wire(number) for number in begin.doors]:
            if await source._can_use(door, begin):
                source.door = door
                break
        return source

    async def join(self, message: pb.JoinGroup) -> None:
        """Reach the group's store, and begin to join; the door is INLINE where it cannot be reached.

        Raises:
            InvalidRequest: no group is wanted, or the message is wrong.
        """
        if self.door not in GROUPS or self._channel is not None:
            raise InvalidRequest(f"the update asks into a group; its door is {self.door}, and it can be joined once")
        invitation = weight_codec.invitation_from_wire(message)
        try:
            store, host = await asyncio.to_thread(reach, invitation)
        except Unavailable as error:
            log.warning("weights come inline", extra={"reason": str(error)})
            self.door = Door.INLINE
            return
        device = self._device if self.door is Door.NCCL and self._device is not None else torch.device("cpu")
        seat = Seat(store=store, secret=invitation.secret, rank=1, backend=Backend(self.door), device=device, host=host)
        self._channel = PairChannel(partial(PairGroup, seat, timeout_s=JOIN_S))

    async def read(self, bucket: pb.WeightBucket) -> memoryview:
        """The bucket's bytes, until the next one is read.

        Raises:
            HandleGone: its handle has ended.
            Unavailable: the sender is gone.
            InvalidRequest: it has no bytes, or too many, or none that this server can reach.
        """
        match bucket.WhichOneof("source"):
            case "inline":
                if len(bucket.inline) > weight_codec.MAX_INLINE_BYTES:
                    raise InvalidRequest(
                        f"a bucket of {len(bucket.inline)} bytes inline; at most {weight_codec.MAX_INLINE_BYTES}"
                    )
                return memoryview(bucket.inline)
            case "handle" if self._shm is not None:
                try:
                    matrix = await self._shm.fetch(codec.handle_from_wire(bucket.handle))
                except EngineFailure as error:  # the sender's fault, not this server's
                    raise InvalidRequest(f"the bucket cannot be read: {error}") from None
                return _octets(matrix.reshape(-1).view(torch.uint8))
            case "handle":
                raise InvalidRequest("a bucket as a handle, but the sender's memory cannot be reached: send it inline")
            case "group_bytes" if self._channel is not None:
                return await self._receive(self._channel, bucket.group_bytes)
            case "group_bytes":
                raise InvalidRequest("a bucket through a group that this server was not asked into")
            case _:
                raise InvalidRequest("a bucket without bytes")

    async def close(self) -> None:
        """Leave. Nothing that was read may be used any more."""
        if self._shm is not None:
            self._shm.close()
        if self._channel is not None:
            await self._channel.close()

    async def _can_use(self, door: Door, begin: pb.BeginUpdate) -> bool:
        match door:
            case Door.SHM:
                self._shm = await _open_shm(begin)
                return self._shm is not None
            case Door.NCCL:
                return self._device is not None
            case Door.GLOO | Door.INLINE:
                return True
            case _:
                assert_never(door)

    async def _receive(self, channel: PairChannel, size_bytes: int) -> memoryview:
        if not 0 < size_bytes <= weight_codec.MAX_GROUP_BYTES:
            raise InvalidRequest(
                f"a bucket of {size_bytes} bytes through the group; 1 to {weight_codec.MAX_GROUP_BYTES} are allowed"
            )
        if len(self._received) < size_bytes:
            self._received = torch.empty(size_bytes, dtype=torch.uint8)
        place = self._received[:size_bytes]
        await channel.receive(place, self._silence_s)
        return _octets(place)


def _octets(tensor: Tensor) -> memoryview:
    return tensor.numpy().data


async def _open_shm(begin: pb.BeginUpdate) -> ShmDoor | None:
    """To the sender's memory; None when it cannot be reached."""
    try:
        return await ShmDoor.connect(Path(begin.broker_socket), begin.session, begin.node_nonce)
    except Unavailable as error:
        log.info("weights do not come through shared memory", extra={"reason": str(error)})
        return None
