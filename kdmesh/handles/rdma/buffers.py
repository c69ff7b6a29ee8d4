"""Memory that RDMA reads write to: used again, or never again."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref

from kdmesh.errors import Unavailable
from kdmesh.handles.rdma.agent import Agent, OwnMemory
from kdmesh.handles.slab.memory import prefault, whole_pages

_MAX_SPARES = 8
_MAX_SPARE_BYTES = 256 * 2**20
_MAX_BURIED_BYTES = 2**30
_MAX_BURIED_AGENTS = 16  # each has about twenty descriptors open


class Buffer:
    """Registered memory of this process. Nobody may write to it but the read that it was taken for."""

    def __init__(self, agent: Agent, size_bytes: int) -> None:
        try:
            # Shared memory, which a forked child does not copy: pages that the adapter writes to must not move.
            self.memory = mmap.mmap(-1, size_bytes)
            prefault(self.memory)
        except OSError as error:
            raise Unavailable(f"no memory for {size_bytes} bytes that are to be read: {error.strerror}") from None
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.own: OwnMemory = agent.register(address, size_bytes)

    @property
    def size_bytes(self) -> int:
        """Of the memory."""
        return self.own.size_bytes


class Buffers:
    """The buffers of one agent. Belongs to one thread, except `give_back`."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._spares: list[Buffer] = []  # finalizers append in any thread; only the owner takes out

    def take(self, size_bytes: int) -> Buffer:
        """A buffer of at least that size. Raises Unavailable when there is no memory, or it cannot be registered."""
        self._trim()
        fitting = [(spare.size_bytes, i) for i, spare in enumerate(self._spares) if spare.size_bytes >= size_bytes]
        if fitting:
            return self._spares.pop(min(fitting)[1])
        return Buffer(self._agent, whole_pages(size_bytes * 5 // 4))

    def give_back(self, buffer: Buffer) -> None:
        """Nobody looks at it any more, and its read is done. For any thread, and for finalizers."""
        self._spares.append(buffer)

    def lend(self, buffer: Buffer) -> ctypes.Array[ctypes.c_char]:
        """The memory of a read that is done; it is given back when the last reference to this has gone."""
        exporter = (ctypes.c_char * buffer.size_bytes).from_buffer(buffer.memory)
        weakref.finalize(exporter, self.give_back, buffer).atexit = False
        return exporter

    def _trim(self) -> None:
        """Keep the newest spares, and none that is huge."""
        kept = 0
        for index in reversed(range(len(self._spares))):
            if kept < _MAX_SPARES and self._spares[index].size_bytes <= _MAX_SPARE_BYTES:
                kept += 1
            else:
                self._agent.deregister(self._spares.pop(index).own)


class Graveyard:
    """Buffers whose read did not end well, for as long as the process lives: a late answer may still be written there.

    The agent that read stays with them.
    """

    def __init__(self, max_bytes: int = _MAX_BURIED_BYTES, max_agents: int = _MAX_BURIED_AGENTS) -> None:
        self._lock = threading.Lock()
        self._max_bytes = max_bytes
        self._max_agents = max_agents
        self._buried: list[tuple[Agent, Buffer]] = []

    @property
    def size_bytes(self) -> int:
        """Of everything in it."""
        return sum(buffer.size_bytes for _, buffer in self._buried)

    @property
    def is_full(self) -> bool:
        """Whether so much lies here that nothing more should be risked."""
        return self.size_bytes >= self._max_bytes or self.num_agents >= self._max_agents

    @property
    def num_agents(self) -> int:
        """How many agents are in it."""
        return len({agent for agent, _ in self._buried})

    def bury(self, agent: Agent, buffer: Buffer) -> None:
        """For ever."""
        # One reference too many: the memory must outlast the agent, in whatever order the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(buffer.memory))
        with self._lock:
            self._buried.append((agent, buffer))


graveyard = Graveyard()
"""This process's."""
