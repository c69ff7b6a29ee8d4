"""Where servers are: addresses as they are given, names that are looked up again and again, services of a cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from kdmesh.cluster.endpoints import SCHEME, Service, ServiceWatch

log = logging.getLogger(__name__)

_DNS = "dns:///"

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Every address of a name, as host:port. Raises OSError when it has none."""


async def resolve(name: str, port: int) -> list[str]:
    """As this machine resolves names."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    hosts = [f"[{where[0]}]" if family is socket.AF_INET6 else where[0] for family, *_, where in found]
    return [f"{host}:{port}" for host in hosts]


class Discovery:
    """The servers that `entries` stand for. Belongs to one event loop.

    Args:
        entries: host:port of one server; dns:///name:port for all that the name resolves to; k8s:///service:port or
            k8s:///service.namespace:port for all that are ready behind a service of the Kubernetes cluster.
        resolve: looks a name up.
        machine: the cluster's name of the machine that this process runs on; None takes KDMESH_NODE_NAME.
    """

    def __init__(self, entries: Sequence[str], resolve: Resolve = resolve, *, machine: str | None = None) -> None:
        self._resolve = resolve
        self._names = [entry for entry in entries if entry.startswith(_DNS)]
        self._services = [entry for entry in entries if entry.startswith(SCHEME)]
        self._fixed = [entry for entry in entries if not entry.startswith((_DNS, SCHEME))]
        self._found: dict[str, Sequence[str]] = {}
        self._watches: dict[str, ServiceWatch] = {}
        self._machine = os.environ.get("KDMESH_NODE_NAME", "") if machine is None else machine
        self._near: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self.last_error = ""
        """Why a name or service was not found the last time; empty when all were."""

    @property
    def changes(self) -> bool:
        """Whether it is worth looking again."""
        return bool(self._names or self._services)

    def is_near(self, address: str) -> bool:
        """Whether the cluster says that this server runs on this process's machine."""
        return address in self._near

    async def look(self) -> list[str]:
        """host:port of each server, every one once. What cannot be looked up stands for what it did before."""
        self._changed.clear()
        errors = [*await self._look_up_names(), *self._look_at_services()]
        self.last_error = errors[-1] if errors else ""
        found = (address for entry in (*self._names, *self._services) for address in self._found.get(entry, ()))
        return list(dict.fromkeys((*self._fixed, *found)))

    async def wait(self, seconds: float) -> None:
        """Return when it is time to look again: at once when a service has changed, for names after so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds if self._names else None):
                await self._changed.wait()

    async def close(self) -> None:
        """Stop looking."""
        watches, self._watches = self._watches, {}
        for watch in watches.values():
            await asyncio.to_thread(watch.close)

    async def _look_up_names(self) -> list[str]:
        errors = []
        for entry in self._names:
            name, _, port = entry.removeprefix(_DNS).rpartition(":")
            try:
                self._found[entry] = await self._resolve(name, int(port))
            except (OSError, UnicodeError) as error:  # the second for what cannot be a name
                errors.append(f"{entry}: {error}")
                log.warning("name not found", extra={"name_looked_up": entry, "reason": str(error)})
        return errors

    def _look_at_services(self) -> list[str]:
        """What the watches have found until now; the first time they only start."""
        near = set()
        for entry in self._services:
            if entry not in self._watches:
                self._watches[entry] = ServiceWatch(Service.parse(entry), self._waker())
            endpoints = self._watches[entry].found
            if endpoints is not None:
                self._found[entry] = [endpoint.address for endpoint in endpoints]
                near |= {endpoint.address for endpoint in endpoints if endpoint.machine == self._machine != ""}
        self._near = frozenset(near)
        return [f"{entry}: {watch.error}" for entry, watch in self._watches.items() if watch.error]

    def _waker(self) -> Callable[[], None]:
        """What another thread calls to end `wait`."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._changed.set)

        return wake
