"""How a client that speaks HTTP knows its server, and what it shows of itself."""

from __future__ import annotations

import socket
import ssl
from typing import Any

from kdmesh.auth.config import ClientTlsConfig
from kdmesh.errors import ConfigError


class _NamedContext(ssl.SSLContext):
    """Wants a certificate of the name that was given, if one was, whatever the address is."""

    server_name: str | None

    def wrap_socket(self, sock: socket.socket, *args: Any, **others: Any) -> ssl.SSLSocket:
        if self.server_name is not None:
            others["server_hostname"] = self.server_name
        return super().wrap_socket(sock, *args, **others)

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, self.server_name or server_hostname, session)


def client_context(tls: ClientTlsConfig) -> ssl.SSLContext:
    """For connections to a server that is known as `tls` says. Raises ConfigError when a file cannot be used."""
    context = _NamedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = tls.server_name
    try:
        if tls.ca is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as error:
        raise ConfigError(f"a file of access.tls cannot be used: {error}") from None
    return context
