"""One server that an update is being sent to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Self

import torch

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import (
    ConfigError,
    DeadlineExpired,
    EngineFailure,
    InvalidRequest,
    KdmeshError,
    RpcError,
    Unavailable,
)
from kdmesh.groups.meeting import JOIN_S, Meeting, address_towards, split_address
from kdmesh.groups.pair_channel import PairChannel
from kdmesh.groups.pair_group import Backend, PairGroup, Seat
from kdmesh.rpc.background_tasks import BackgroundTasks
from kdmesh.rpc.calls import our_errors
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.weights import codec as weight_codec
from kdmesh.rpc.weights.carriers import ByHandle, Carrier, FilledBucket, Inline, ThroughGroup
from kdmesh.rpc.weights.offer import DoorOffer
from kdmesh.rpc.weights.services import ServedWeights, UpdateStream, WeightService
from kdmesh.tracing import spans
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.weights.doors import GROUPS, Door
from kdmesh.weights.manifest import Manifest

log = logging.getLogger(__name__)


class WeightLink:
    """Belongs to the event loop that opened it.

    Attributes:
        address: host:port.
        door: how bytes travel.
        failure: why it takes no more buckets; None while it does.
        has_sent_commit: whether the server may have committed.
        has_committed: whether it has.
    """

    door = Door.INLINE

    def __init__(self, address: str, service: WeightService, offer: DoorOffer, access: AccessConfig) -> None:
        """Use `open`."""
        self.address = address
        self.failure: KdmeshError | None = None
        self.has_sent_commit = self.has_committed = False
        self._offer = offer
        self._channel = open_channel(address, access)
        self._service = service
        self._tasks = BackgroundTasks()
        self._closing = contextlib.AsyncExitStack()
        self._closing.push_async_callback(self._channel.close)

    @classmethod
    async def open(
        cls,
        address: str,
        service: WeightService,
        manifest: Manifest,
        offer: DoorOffer,
        *,
        access: AccessConfig = OPEN_ACCESS,
    ) -> Self:
        """Announce an update. One attempt.

        Raises:
            RpcError: as the service's proto file says of UpdateWeights.
            Unavailable: also when a door was asked for that is a group, and none can be made.
            ConfigError: a door was asked for that the server cannot use; or `access` cannot be used.
        """
        link = cls(address, service, offer, access)
        try:
            await link._begin(manifest)
        except BaseException:
            await link.close()
            raise
        return link

    def put(self, bucket: FilledBucket, done: Callable[[], None]) -> None:
        """Send a bucket after those before it; `done` is called once the server has it, or never will."""
        self._tasks.start(self._carry(bucket, done))

    async def commit(self, version: int) -> None:
        """Return when the server serves what it was sent. Every bucket must be done.

        Raises:
            KdmeshError: it does not, as far as this side can tell.
        """
        if self.failure is not None:
            raise self.failure
        self.has_sent_commit = True
        reply = await self._stream.send(pb.UpdateWeightsRequest(commit=pb.CommitUpdate()))
        if reply.weight_version != version:
            raise EngineFailure(
                f"{self.address} serves version {reply.weight_version} after version {version} was sent"
            )
        self.has_committed = True

    async def close(self) -> None:
        """End the stream and the connection. Without a commit, the server goes on with its old weights."""
        await self._closing.aclose()

    async def _begin(self, manifest: Manifest) -> None:
        begin = weight_codec.manifest_to_wire(manifest)
        self._offer.announce(begin)
        begin.traceparent = spans.current()
        self._stream = UpdateStream(self._service.update(self._channel), self.address)
        self._closing.push_async_callback(self._stream.close)
        reply = await self._stream.send(pb.UpdateWeightsRequest(begin=begin))
        self.door = self._taken(reply)
        self._carrier = await self._carrier_through(self.door)
        self._closing.push_async_callback(self._tasks.close)
        log.info("weights on their way", extra={"address": self.address, "door": self.door.value})

    async def _carrier_through(self, door: Door) -> Carrier:
        if door in GROUPS:
            try:
                return await self._invite(door)
            except Unavailable as error:
                if self._offer.choice != "auto":
                    raise
                log.warning("weights go inline", extra={"address": self.address, "reason": str(error)})
                self.door = Door.INLINE
        return ByHandle(self._stream) if door is Door.SHM else Inline(self._stream)

    async def _invite(self, door: Door) -> Carrier:
        """Make a group with the server. Raises Unavailable when that is not possible."""
        server_host = split_address(self.address)[0]
        host = self._offer.advertise or await asyncio.to_thread(address_towards, server_host)
        self._meeting = await asyncio.to_thread(Meeting, host, timeout_s=JOIN_S)  # lasts as long as the group
        store, invitation = await asyncio.to_thread(self._meeting.invite)
        message = weight_codec.invitation_to_wire(invitation)
        reply = await self._stream.send(pb.UpdateWeightsRequest(join=message))
        if self._taken(reply) is not door:
            raise Unavailable(f"{self.address} cannot reach {invitation.store_address}")
        device = self._offer.device if door is Door.NCCL else torch.device("cpu")
        secret, backend = invitation.secret, Backend(door)
        seat = Seat(store=store, secret=secret, rank=0, backend=backend, device=device, host=host)
        channel = PairChannel(partial(PairGroup, seat, timeout_s=JOIN_S))
        self._closing.push_async_callback(channel.close)
        await channel.joined()
        return ThroughGroup(self._stream, channel, timeout_s=self._offer.bucket_s)

    def _taken(self, reply: pb.UpdateWeightsReply) -> Door:
        """The door that a reply names, which must be one that was offered."""
        try:
            door = weight_codec.DOORS.from_wire(reply.door)
        except InvalidRequest as error:
            raise EngineFailure(f"{self.address} takes no door: {error}") from None
        if door not in (*self._offer.doors, Door.INLINE):
            raise EngineFailure(f"{self.address} takes door {door}, which was not offered")
        if door is Door.INLINE and self._offer.choice not in ("auto", "inline"):
            raise ConfigError(f"door {self._offer.choice}, but {self.address} {self._offer.obstacle}")
        return door

    async def _carry(self, bucket: FilledBucket, done: Callable[[], None]) -> None:
        try:
            if self.failure is None:
                async with asyncio.timeout(self._offer.bucket_s):
                    await self._carrier.carry(bucket)
        except TimeoutError:
            self._fail(DeadlineExpired(f"it took no bucket for {self._offer.bucket_s:g} s"))
        except RpcError as error:
            self._fail(error)
        finally:
            done()

    def _fail(self, error: KdmeshError) -> None:
        self.failure = self.failure or error


async def describe_weights(address: str, service: WeightService, access: AccessConfig) -> ServedWeights:
    """What the server serves now. One attempt.

    Raises:
        RpcError: as the service's proto file says of Describe.
        EngineFailure: something else answers there.
    """
    channel = open_channel(address, access)
    try:
        with our_errors(address):
            return await service.describe(channel, address)
    except InvalidRequest as error:
        raise EngineFailure(f"{address} describes an impossible model: {error}") from None
    finally:
        await channel.close()
