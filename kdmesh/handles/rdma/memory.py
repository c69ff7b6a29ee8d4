"""A server's segments, for clients that read them by RDMA."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
from collections.abc import Iterable

from kdmesh.errors import ConfigError, HandleGone, Unavailable
from kdmesh.handles.rdma.agent import Agent, OwnMemory, RemoteMemory, check_transports
from kdmesh.handles.slab.memory import Segment, create_segment

log = logging.getLogger(__name__)


class RdmaMemory:
    """Registers each segment once, the first time that it is asked for, until the segment is closed.

    Nothing here knows of a read: readers must ask afterwards whether the handle was still theirs.
    """

    def __init__(self) -> None:
        """Nothing can be read yet. Blocks.

        Raises:
            ConfigError: NIXL is not to be had, or it could use transports that are not safe.
        """
        check_transports(os.environ)
        self._lock = threading.Lock()
        self._agent: Agent | None = Agent(is_read=True)
        self._own: dict[int, OwnMemory] = {}  # by the segment's number
        self._told: dict[int, RemoteMemory] = {}
        self._probe: Segment | None = None

    def serve(self, nonce: bytes, segments: Iterable[Segment]) -> None:
        """Register these now; called once. Blocks.

        Args:
            nonce: what a client reads to see that it has come to the right server.
            segments: that answers will lie in.

        Raises:
            ConfigError: they cannot be registered.
        """
        assert self._agent is not None
        self._probe = create_segment(len(nonce))
        self._probe.writable[: len(nonce)] = nonce
        try:
            for segment in (self._probe, *segments):
                segment.before_close.append(self._drop)
                self._register(segment)
        except Unavailable as error:
            raise ConfigError(f"{error}; is the limit of locked memory (ulimit -l) high enough?") from None
        log.info("rows can be read by RDMA", extra={"agent": self._agent.name})

    async def probe(self) -> RemoteMemory:
        """Memory that begins with the nonce."""
        assert self._probe is not None
        return await self.locate(self._probe)

    async def locate(self, segment: Segment) -> RemoteMemory:
        """How to read a segment: a capability, for those only who may read it.

        Raises:
            HandleGone: the segment is being closed.
            Unavailable: it cannot be registered.
        """
        if told := self._told.get(segment.number):
            return told
        segment.before_close.append(self._drop)  # first, so that closing waits for what the thread does
        return await asyncio.to_thread(self._register, segment)

    def close(self) -> None:
        """Nothing can be read any more; who reads now fails."""
        with self._lock:
            for number in tuple(self._own):
                self._deregister(number)
            self._agent = None
        if self._probe is not None:
            self._probe.close()

    def _register(self, segment: Segment) -> RemoteMemory:
        with self._lock:
            if told := self._told.get(segment.number):
                return told
            if segment.is_closed or self._agent is None:
                raise HandleGone("the segment is being closed")
            own = self._agent.register(_address(segment), segment.size_bytes)
            self._own[segment.number] = own
            self._told[segment.number] = told = self._agent.describe(own)
            return told

    def _drop(self, segment: Segment) -> None:
        with self._lock:
            if segment.number in self._own:
                self._deregister(segment.number)

    def _deregister(self, number: int) -> None:
        assert self._agent is not None
        self._told.pop(number, None)
        try:
            self._agent.deregister(self._own.pop(number))
        except Unavailable as error:
            log.error("memory stays registered", extra={"reason": str(error)})


def _address(segment: Segment) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(segment.writable))
