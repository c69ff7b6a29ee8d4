"""Where servers are: addresses as they are given, and names that are looked up again and again."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

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
    """The servers that `entries` stand for.

    Args:
        entries: host:port of one server, or dns:///name:port for all that the name resolves to.
        resolve: looks a name up.
    """

    def __init__(self, entries: Sequence[str], resolve: Resolve = resolve) -> None:
        self._resolve = resolve
        self._names = [entry for entry in entries if entry.startswith(_DNS)]
        self._fixed = [entry for entry in entries if not entry.startswith(_DNS)]
        self._found: dict[str, Sequence[str]] = {}
        self.last_error = ""
        """Why a name was not found the last time; empty when all were."""

    @property
    def changes(self) -> bool:
        """Whether it is worth looking again."""
        return bool(self._names)

    async def look(self) -> list[str]:
        """host:port of each server, every one once. A name that cannot be looked up stands for what it did before."""
        self.last_error = ""
        for entry in self._names:
            name, _, port = entry.removeprefix(_DNS).rpartition(":")
            try:
                self._found[entry] = await self._resolve(name, int(port))
            except (OSError, UnicodeError) as error:  # the second for what cannot be a name
                self.last_error = f"{entry}: {error}"
                log.warning("name not found", extra={"name_looked_up": entry, "reason": str(error)})
        found = (address for entry in self._names for address in self._found.get(entry, ()))
        return list(dict.fromkeys((*self._fixed, *found)))
