"""Where the two processes of a group find each other."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from kdmesh.errors import ConfigError, Unavailable

JOIN_S = 10.0
"""Longest time for two processes to make a group."""

PROOF_BYTES = 16
SECRET_BYTES = 2 * PROOF_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What the second process of a group needs to join it."""

    store_address: str  # host:port
    secret: bytes  # the first process proves itself with its first half, the second with the other

    @property
    def prefix(self) -> str:
        """Of the group's keys in the store; it tells nothing of the secret."""
        return f"pair-{hashlib.blake2b(self.secret, digest_size=8).hexdigest()}"


class Meeting:
    """A store on a port of its own, for any number of groups."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        """Listen on one address of this machine, on any free port. Raises ConfigError when it is none."""
        listener = _listen(host)
        port = listener.getsockname()[1]
        self._timeout_s = timeout_s
        self._store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),  # or it would listen on every address
        )
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def invite(self) -> tuple[Store, Invitation]:
        """A place in the store for one group, and what leads the second process there. Blocks for a moment.

        The place has a connection of its own: whoever waits for another process lets nobody else use its connection.
        """
        invitation = Invitation(store_address=self._address, secret=secrets.token_bytes(SECRET_BYTES))
        return visit(invitation, timeout_s=self._timeout_s), invitation

    def forget(self, invitation: Invitation) -> None:
        """A group is over: drop what it left in the store. Blocks for a moment."""
        with contextlib.suppress(RuntimeError):
            for key in self._store.list_keys():
                if key.startswith(invitation.prefix):
                    self._store.delete_key(key)


def check_own_address(host: str) -> None:
    """Raises ConfigError when this machine cannot listen there."""
    _listen(host).close()


def _listen(host: str) -> socket.socket:
    """On any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from None


def visit(invitation: Invitation, *, timeout_s: float) -> Store:
    """The place that an invitation leads to. Blocks. Raises Unavailable when it cannot be reached."""
    host, port = split_address(invitation.store_address)
    try:
        # Asked first, because torch tries for as long as it may, and writes pages to stderr.
        socket.create_connection((host, port), timeout=timeout_s).close()
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except OSError as error:
        raise Unavailable(f"no connection to {invitation.store_address}: {error}") from None
    except RuntimeError as error:
        raise Unavailable(f"no store at {invitation.store_address}: {first_line(error)}") from None
    return PrefixStore(invitation.prefix, store)


def reach(invitation: Invitation) -> tuple[Store, str]:
    """As `visit`, and the address of this machine that the first process reaches."""
    host = address_towards(split_address(invitation.store_address)[0])
    return visit(invitation, timeout_s=JOIN_S), host


def split_address(address: str) -> tuple[str, int]:
    """host and port of host:port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches `host`. Raises Unavailable when there is no way."""
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unavailable(f"no way to {host}: {error}") from None


def first_line(error: RuntimeError) -> str:
    """Of torch's, without the place in its source that it begins with."""
    line = str(error).partition("\n")[0]
    return line.partition("] ")[2] if line.startswith("[/") else line
