"""The sender's shared memory: a few buffers, each filled once and read by every server of the node.

A slot of a slab has one reader, who is given it; a bucket has as many as there are servers, and the sender knows from
their replies when all of them are done. So a handle to a bucket may be claimed any number of times, until the
buffer gets another.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

from kdmesh.errors import ConfigError, HandleGone
from kdmesh.handles.key import Key
from kdmesh.handles.slab.broker import Broker
from kdmesh.handles.slab.memory import Segment, create_segment_in_thread
from kdmesh.types import DType, Handle

_EPOCH = 1  # a buffer's memory is never replaced
_CELL = DType.FLOAT32  # what buckets are counted in; it says nothing of the tensors in them


class BucketMemory:
    """Buffers and the broker that lends them; belongs to one event loop. Buffers are numbered from 0.

    Attributes:
        socket_path: where the broker listens.
        session: 16 random bytes, good for every server.
        nonce: 16 random bytes that the broker tells.
    """

    def __init__(self, segments: list[Segment], socket_path: Path) -> None:
        """Use `bucket_memory`."""
        self.socket_path = socket_path
        self.session = secrets.token_bytes(16)
        self.nonce = secrets.token_bytes(16)
        self._segments = segments
        self._tokens = [b""] * len(segments)

    @property
    def num_buffers(self) -> int:
        """How many there are."""
        return len(self._segments)

    def writable(self, buffer: int) -> memoryview:
        """All of a buffer. Nobody who was told its handle may still read."""
        return self._segments[buffer].writable

    def offer(self, buffer: int, size_bytes: int) -> Handle:
        """A new handle to the first bytes of a buffer; the one before it ends."""
        self._tokens[buffer] = secrets.token_bytes(16)
        return Handle(
            segment=buffer,
            epoch=_EPOCH,
            token=self._tokens[buffer],
            offset_bytes=0,
            rows=1,
            cols=-(-size_bytes // _CELL.size_bytes),
            dtype=_CELL,
        )

    # For the broker

    def is_open(self, session: bytes) -> bool:
        """Whether it is the session."""
        return hmac.compare_digest(session, self.session)

    def claim(self, session: bytes, key: Key, holder: int) -> Segment:
        """The segment of the newest handle to a buffer. Raises HandleGone when `key` is another."""
        is_buffer = 0 <= key.segment < len(self._segments) and key.epoch == _EPOCH
        if not is_buffer or not hmac.compare_digest(self._tokens[key.segment], key.token):
            raise HandleGone(f"the handle to buffer {key.segment} has ended")
        return self._segments[key.segment]

    def release(self, session: bytes, key: Key) -> None:
        """Nothing: a server says with its reply that it is done."""

    def holder_gone(self, holder: int) -> None:
        """Nothing: the stream of that server ends too."""

    def process_died(self, holder: int, session: bytes) -> None:
        """Nothing: the stream of that server ends too."""


@contextlib.asynccontextmanager
async def bucket_memory(socket_path: Path, *, buffers: int, buffer_bytes: int) -> AsyncIterator[BucketMemory]:
    """Memory that lasts as long as the context, all of it touched, and a broker for processes of this user.

    Raises:
        ConfigError: the memory is not there, or the socket cannot be made.
    """
    with contextlib.ExitStack() as stack:
        segments: list[Segment] = []
        for _ in range(buffers):
            try:
                segments.append(await create_segment_in_thread(buffer_bytes))
            except OSError as error:
                raise ConfigError(f"cannot make {buffers} buffers of {buffer_bytes} bytes: {error.strerror}") from None
            stack.callback(segments[-1].close)
        memory = BucketMemory(segments, socket_path)
        broker = Broker(memory, nonce=memory.nonce, path=socket_path)
        stack.callback(broker.close)
        yield memory
