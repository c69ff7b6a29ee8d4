"""The sender's end of each door that an update's bytes go through."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kdmesh.errors import Unavailable
from kdmesh.groups.pair_channel import PairChannel
from kdmesh.rpc import codec
from kdmesh.rpc.weights import codec as weight_codec
from kdmesh.rpc.weights.services import UpdateStream
from kdmesh.types import Handle
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.weights.buckets import BucketEntry, cut
from kdmesh.weights.digests import digest

_INLINE_AHEAD = 4  # messages sent and unanswered, so that neither side waits for the other
# After a group broke; whatever broke it ends the stream too, and says more.
_REASON_S = 5.0

_Answer: TypeAlias = "asyncio.Future[pb.UpdateWeightsReply]"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledBucket:
    """Bytes that stay as they are until every server is done with them."""

    entries: tuple[BucketEntry, ...]
    data: memoryview
    handle: Handle  # to the same bytes


class Carrier(Protocol):
    """Brings buckets to one server, in the order in which `carry` is called."""

    async def carry(self, bucket: FilledBucket) -> None:
        """Return when the server has copied it. Raises RpcError when it has not."""
        ...


class ByHandle:
    """The server copies from shared memory; its next bucket is announced while it does."""

    def __init__(self, stream: UpdateStream) -> None:
        self._stream = stream

    async def carry(self, bucket: FilledBucket) -> None:
        """See Carrier."""
        handle = codec.handle_to_wire(bucket.handle)
        entries = weight_codec.entries_to_wire(bucket.entries)
        await self._stream.send(pb.UpdateWeightsRequest(bucket=pb.WeightBucket(entries=entries, handle=handle)))


class Inline:
    """Bytes go in messages."""

    def __init__(self, stream: UpdateStream) -> None:
        self._stream = stream
        self._turn = asyncio.Lock()

    async def carry(self, bucket: FilledBucket) -> None:
        """See Carrier."""
        unanswered: deque[_Answer] = deque()
        async with self._turn:
            for message in _inline(bucket):
                unanswered.append(self._stream.send(message))
                if len(unanswered) >= _INLINE_AHEAD:
                    await unanswered.popleft()
            while unanswered:
                await unanswered.popleft()


class ThroughGroup:
    """Bytes go through a group; the next bucket is on its way while the server copies one."""

    def __init__(self, stream: UpdateStream, channel: PairChannel, *, timeout_s: float) -> None:
        """
        Args:
            stream: of the update.
            channel: joined.
            timeout_s: how long the server may take to receive one bucket.
        """
        self._stream = stream
        self._channel = channel
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()

    async def carry(self, bucket: FilledBucket) -> None:
        """See Carrier."""
        entries = weight_codec.entries_to_wire(bucket.entries)
        message = pb.WeightBucket(entries=entries, group_bytes=len(bucket.data))
        async with self._turn:
            answer = self._stream.send(pb.UpdateWeightsRequest(bucket=message))
            answer.add_done_callback(self._ended)
            try:
                await self._channel.send(bucket.data, self._timeout_s)
            except Unavailable:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REASON_S):
                        await answer
                raise
        await answer

    def _ended(self, answer: _Answer) -> None:
        """Nobody receives any more when the stream has ended."""
        if answer.cancelled() or answer.exception() is not None:
            self._channel.abort()


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
