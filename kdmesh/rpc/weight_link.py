"""One server that an update is being sent to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from kdmesh.errors import ConfigError, EngineFailure, InvalidRequest, KdmeshError, RpcError
from kdmesh.rpc import codec, weight_codec
from kdmesh.rpc.calls import our_errors
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.update_stream import UpdateStream
from kdmesh.rpc.weight_services import ServedWeights, WeightService
from kdmesh.types import Handle
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.weights.bucket_memory import BucketMemory
from kdmesh.weights.buckets import BucketEntry, cut
from kdmesh.weights.digests import digest
from kdmesh.weights.manifest import Manifest

WeightDoor: TypeAlias = Literal["auto", "shm", "inline"]

_INLINE_AHEAD = 4  # messages sent and unanswered, so that neither side waits for the other


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledBucket:
    """Bytes that stay as they are until every server is done with them."""

    entries: tuple[BucketEntry, ...]
    data: memoryview
    handle: Handle  # to the same bytes


class WeightLink:
    """Belongs to the event loop that opened it.

    Attributes:
        address: host:port.
        failure: why it takes no more buckets; None while it does.
        has_sent_commit: whether the server may have committed.
        has_committed: whether it has.
    """

    def __init__(self, address: str, service: WeightService) -> None:
        """Use `open`."""
        self.address = address
        self.failure: KdmeshError | None = None
        self.has_sent_commit = self.has_committed = False
        self._channel = open_channel(address)
        self._service = service
        self._buckets: asyncio.Queue[tuple[FilledBucket, Callable[[], None]]] = asyncio.Queue()
        self._closing = contextlib.AsyncExitStack()
        self._closing.push_async_callback(self._channel.close)

    @classmethod
    async def open(
        cls, address: str, service: WeightService, manifest: Manifest, memory: BucketMemory, door: WeightDoor
    ) -> Self:
        """Announce an update. One attempt.

        Raises:
            RpcError: as the service's proto file says of UpdateWeights.
            ConfigError: `door` is shm, and the server is not on this node.
        """
        link = cls(address, service)
        try:
            await link._begin(manifest, memory, door)
        except BaseException:
            await link.close()
            raise
        return link

    def put(self, bucket: FilledBucket, done: Callable[[], None]) -> None:
        """Send a bucket after those before it; `done` is called once the server has it, or never will."""
        self._buckets.put_nowait((bucket, done))

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

    async def close(self) -> None:
        """End the stream and the connection. Without a commit, the server goes on with its old weights."""
        await self._closing.aclose()

    async def _begin(self, manifest: Manifest, memory: BucketMemory, door: WeightDoor) -> None:
        begin = weight_codec.manifest_to_wire(manifest)
        if door != "inline":
            begin.broker_socket = str(memory.socket_path)
            begin.session, begin.node_nonce = memory.session, memory.nonce
        self._stream = UpdateStream(self._service.update(self._channel), self.address)
        self._closing.push_async_callback(self._stream.close)
        reply = await self._stream.send(pb.UpdateWeightsRequest(begin=begin))
        if door == "shm" and reply.needs_inline:
            raise ConfigError(f"door shm, but {self.address} cannot reach this process's shared memory")
        worker = asyncio.create_task(self._work(is_inline=reply.needs_inline), name="weight link")
        self._closing.push_async_callback(_ended, worker)

    async def _work(self, *, is_inline: bool) -> None:
        while True:
            bucket, done = await self._buckets.get()
            if self.failure is not None:
                done()
            elif is_inline:
                await self._send_inline(bucket)
                done()
            else:
                answer = self._stream.send(_by_handle(bucket))
                # Not awaited: the next bucket is to be there when the server is done with this one.
                answer.add_done_callback(functools.partial(self._answered, done))

    async def _send_inline(self, bucket: FilledBucket) -> None:
        unanswered: deque[asyncio.Future[pb.UpdateWeightsReply]] = deque()
        try:
            for message in _inline(bucket):
                unanswered.append(self._stream.send(message))
                if len(unanswered) >= _INLINE_AHEAD:
                    await unanswered.popleft()
            while unanswered:
                await unanswered.popleft()
        except RpcError as error:
            self.failure = self.failure or error

    def _answered(self, done: Callable[[], None], answer: asyncio.Future[pb.UpdateWeightsReply]) -> None:
        if not answer.cancelled() and isinstance(error := answer.exception(), RpcError):
            self.failure = self.failure or error
        done()


async def describe_weights(address: str, service: WeightService) -> ServedWeights:
    """What the server serves now. One attempt.

    Raises:
        RpcError: as the service's proto file says of Describe.
        EngineFailure: something else answers there.
    """
    channel = open_channel(address)
    try:
        with our_errors(address):
            return await service.describe(channel, address)
    except InvalidRequest as error:
        raise EngineFailure(f"{address} describes an impossible model: {error}") from None
    finally:
        await channel.close()


def _by_handle(bucket: FilledBucket) -> pb.UpdateWeightsRequest:
    handle = codec.handle_to_wire(bucket.handle)
    return pb.UpdateWeightsRequest(
        bucket=pb.WeightBucket(entries=weight_codec.entries_to_wire(bucket.entries), handle=handle)
    )


def _inline(bucket: FilledBucket) -> Iterator[pb.UpdateWeightsRequest]:
    """The same bytes as messages that are small enough."""
    digests = {(entry.part.bucket_offset_bytes, entry.part.size_bytes): entry.digest for entry in bucket.entries}
    for pieces in cut([entry.part for entry in bucket.entries], weight_codec.MAX_INLINE_BYTES):
        data = bytearray(pieces[-1].part.end_bytes)
        entries = []
        for piece in pieces:
            octets = bucket.data[piece.origin_bytes :][: piece.part.size_bytes]
            data[piece.part.bucket_offset_bytes : piece.part.end_bytes] = octets
            whole = digests.get((piece.origin_bytes, piece.part.size_bytes))
            entries.append(BucketEntry(part=piece.part, digest=whole or digest(octets)))
        yield pb.UpdateWeightsRequest(
            bucket=pb.WeightBucket(entries=weight_codec.entries_to_wire(entries), inline=bytes(data))
        )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
