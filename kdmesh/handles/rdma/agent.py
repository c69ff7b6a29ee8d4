"""This process's part in RDMA: a NIXL agent, which has memory that others read, or reads theirs.

NIXL is an extra (`pip install 'kdmesh[rdma]'`), and loaded only here. Of its backends UCX alone is used. What NIXL
tells of an agent (its *metadata*) is a capability: whoever has it can connect, and read what it names.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from kdmesh.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

UNSAFE_VARIABLE = "KDMESH_RDMA_UNSAFE_TRANSPORTS"
"""Set to UNSAFE_VALUE, it lets UCX use any transport: for tests between processes that trust each other."""

UNSAFE_VALUE = "for-tests-only"

# Their reads are done by the network adapter, which checks the bounds of what was registered. "ud" is none of them.
_RDMA = frozenset({"rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5"})
_HARMLESS = frozenset({"self"})  # an agent is connected to itself, too
_WHEELS = ("nixl_cu12", "nixl_cu13")
# NIXL's own Python interface sets 0, which keeps a core busy. RDMA needs the thread for connections only.
_PROGRESS_US = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteMemory:
    """Memory of another process, and what is needed to read it: a capability."""

    agent: str  # name of the agent that registered it; another one after every start of that process
    metadata: bytes  # for Agent.add_peer
    address: int  # in the other process
    size_bytes: int

    def digest(self) -> bytes:
        """16 bytes; see LocateMemoryResponse.digest."""
        place = self.address.to_bytes(8, "little") + self.size_bytes.to_bytes(8, "little")
        return hashlib.blake2b(place + self.agent.encode() + self.metadata, digest_size=16).digest()

    def overlaps(self, other: RemoteMemory) -> bool:
        """Whether some bytes belong to both."""
        return self.address < other.address + other.size_bytes and other.address < self.address + self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnMemory:
    """Memory of this process that its agent knows."""

    address: int
    size_bytes: int
    registration: Any  # NIXL's


def check_transports(environ: Mapping[str, str]) -> None:
    """Refuse to let UCX use anything but RDMA.

    Over any other transport UCX serves reads and writes in software, and checks no bounds: whoever is connected has the
    whole memory of the process, and can end it.

    Raises:
        ConfigError: UCX_TLS is unset, or names another transport, and UNSAFE_VARIABLE does not permit it.
    """
    named = [name.strip() for name in environ.get("UCX_TLS", "").split(",") if name.strip()]
    if set(named) & _RDMA and set(named) <= _RDMA | _HARMLESS:
        return
    if environ.get(UNSAFE_VARIABLE) == UNSAFE_VALUE:
        log.warning(
            "RDMA OVER UNSAFE TRANSPORTS: everybody who is connected can read and write this whole process",
            extra={"ucx_tls": ",".join(named), "because_of": UNSAFE_VARIABLE},
        )
        return
    told = f"is {','.join(named)}" if named else "is not set"
    raise ConfigError(
        f"UCX_TLS {told}; for RDMA it must name nothing but RDMA transports ({', '.join(sorted(_RDMA))}), "
        "because UCX checks no bounds over any other"
    )


class Agent:
    """A NIXL agent with a name of its own. Any thread may call it; a call takes no longer than to copy what it reads.

    Raises, when made:
        ConfigError: NIXL is not installed, or UCX finds no transport that it may use.
    """

    def __init__(self, *, is_read: bool) -> None:
        """With `is_read`, a thread of NIXL's answers those who connect; without, this agent can only read."""
        self.name = f"kdmesh-{secrets.token_hex(16)}"
        self._nixl = nixl = _load()
        self._errors = _errors_of(nixl)
        config = nixl.nixlAgentConfig()
        config.useProgThread = is_read
        config.pthrDelay = _PROGRESS_US
        config.useListenThread = False  # it would hand metadata to everybody who asks
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        try:
            self._agent = nixl.nixlAgent(self.name, config)
            self._agent.createBackend("UCX", {})
        except self._errors as error:
            raise ConfigError(
                f"no RDMA: NIXL's UCX backend does not start ({error}) with UCX_TLS={os.environ.get('UCX_TLS', '')}"
            ) from None

    def register(self, address: int, size_bytes: int) -> OwnMemory:
        """Memory that may be read by others, or read to. Raises Unavailable when it cannot be pinned."""
        with self._failing("memory is not to be registered"):
            registration = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, size_bytes, 0, "")])
            self._agent.registerMem(registration, [])
        return OwnMemory(address=address, size_bytes=size_bytes, registration=registration)

    def deregister(self, memory: OwnMemory) -> None:
        """Memory is about to go."""
        with self._failing("memory is not to be deregistered"):
            self._agent.deregisterMem(memory.registration, [])

    def describe(self, memory: OwnMemory) -> RemoteMemory:
        """What another process needs to read this memory, and no other of this process."""
        with self._failing("memory is not to be described"):
            metadata = self._agent.getLocalPartialMD(memory.registration, True, [])
        return RemoteMemory(agent=self.name, metadata=metadata, address=memory.address, size_bytes=memory.size_bytes)

    def add_peer(self, memory: RemoteMemory) -> None:
        """Connect to its process, or, when that was done before, learn of more memory.

        Raises:
            Unavailable: it is no metadata, or of another agent. This agent must not be used any more: NIXL may have
                lost what it knew of its peer.
        """
        with self._failing("the server's metadata is not to be used"):
            name = self._agent.loadRemoteMD(memory.metadata)
        if name != memory.agent.encode():
            raise Unavailable(f"the server's metadata is of agent {name!r}; it was said to be of {memory.agent}")

    def remove_peer(self, name: str) -> None:
        """Disconnect, and forget what was known; nothing happens when nothing was."""
        with self._failing("no farewell"):
            self._agent.invalidateRemoteMD(name)

    def begin_read(self, source: RemoteMemory, target: OwnMemory, *, offset_bytes: int, size_bytes: int) -> Transfer:
        """Begin to read the start of `target` full. Raises Unavailable, and who knows what is written then."""
        nixl = self._nixl
        with self._failing("a read does not begin"):
            number = self._agent.createXferReq(
                nixl.NIXL_READ,
                nixl.nixlXferDList(nixl.DRAM_SEG, [(target.address, size_bytes, 0)]),
                nixl.nixlXferDList(nixl.DRAM_SEG, [(source.address + offset_bytes, size_bytes, 0)]),
                source.agent,
                b"",
                [],
            )
            return Transfer(number=number, is_done=self._is_done(self._agent.postXferReq(number, b"")))

    def poll(self, transfer: Transfer) -> Transfer:
        """How a read stands now. Raises Unavailable when it has failed."""
        with self._failing("a read failed"):
            state = self._agent.getXferStatus(transfer.number)
        return Transfer(number=transfer.number, is_done=self._is_done(state))

    def end(self, transfer: Transfer) -> None:
        """A read that is done is not asked for any more."""
        with self._failing("a read is not to be ended"):
            self._agent.releaseXferReq(transfer.number)

    def _is_done(self, state: object) -> bool:
        if state == self._nixl.NIXL_SUCCESS:
            return True
        if state == self._nixl.NIXL_IN_PROG:
            return False
        raise Unavailable(f"RDMA: a read ended with {state}")

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise Unavailable(f"RDMA: {what}: {type(error).__name__} {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A read that was begun."""

    number: int  # NIXL's
    is_done: bool


def _load() -> ModuleType:
    """The bindings, without NIXL's Python layer: that one fixes the thread's delay, and knows pickled descriptors."""
    for wheel in _WHEELS:
        try:
            return importlib.import_module(f"{wheel}._bindings")
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise ConfigError(f"no RDMA: {wheel} does not load: {error}") from None
    raise ConfigError("no RDMA: NIXL is not installed; pip install 'kdmesh[rdma]'")


def _errors_of(nixl: ModuleType) -> tuple[type[Exception], ...]:
    """NIXL's exceptions, which have no base of their own."""
    found = (value for name, value in vars(nixl).items() if name.startswith("nixl") and name.endswith("Error"))
    return tuple(error for error in found if isinstance(error, type) and issubclass(error, Exception))
