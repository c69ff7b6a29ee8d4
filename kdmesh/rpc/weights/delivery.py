"""One pass over the weights, to all servers that take part in it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kdmesh.errors import DeadlineExpired, KdmeshError
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.weights.carriers import FilledBucket
from kdmesh.rpc.weights.limits import Limits
from kdmesh.rpc.weights.link import WeightLink
from kdmesh.weights.bucket_memory import BucketMemory
from kdmesh.weights.buckets import BucketEntry


class Delivery:
    """Belongs to one event loop. A buffer is filled again when every server is done with what was in it.

    What goes wrong with a server becomes its link's `failure`; when the deadline passes, that of all that have not
    committed.
    """

    def __init__(self, links: Sequence[WeightLink], memory: BucketMemory, limits: Limits) -> None:
        """Takes the links over; all of the memory is free. `limits` hold for every wait."""
        self.links = tuple(links)
        self._memory = memory
        self._limits = limits
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for buffer in range(memory.num_buffers):
            self._free.put_nowait(buffer)

    async def next_buffer(self, deadline: Deadline) -> int | None:
        """A buffer to fill; None when nobody listens any more."""
        try:
            async with self._limits.of(deadline.left_s):
                buffer = await self._free.get()
        except TimeoutError:
            self._give_up()
            return None
        return buffer if any(link.failure is None for link in self.links) else None

    async def hand_over(self, buffer: int, entries: tuple[BucketEntry, ...]) -> None:
        """Send what was filled in to every server."""
        size_bytes = entries[-1].part.end_bytes
        data = self._memory.writable(buffer)[:size_bytes]
        bucket = FilledBucket(entries=entries, data=data, handle=self._memory.offer(buffer, size_bytes))
        readers = len(self.links)

        def done() -> None:
            nonlocal readers
            readers -= 1
            if readers == 0:
                self._free.put_nowait(buffer)

        for link in self.links:
            link.put(bucket, done)

    async def commit(self, version: int, deadline: Deadline) -> None:
        """Have every server commit that has all of it."""
        try:
            async with self._limits.of(deadline.left_s):
                for _ in range(self._memory.num_buffers):  # all are free: everything has been copied
                    await self._free.get()
                await asyncio.gather(*(_commit(link, version) for link in self.links))
        except TimeoutError:
            self._give_up()

    async def close(self) -> None:
        """End the streams; a server that has not committed goes on with its old weights."""
        await asyncio.gather(*(link.close() for link in self.links))

    def _give_up(self) -> None:
        for link in self.links:
            if not link.has_committed:
                link.failure = link.failure or DeadlineExpired("it was not done in time")


async def _commit(link: WeightLink, version: int) -> None:
    try:
        await link.commit(version)
    except KdmeshError as error:
        link.failure = error
