"""Certificates of servers, and the names in those of clients."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdmesh.auth.certificate_expiry import expires_at_s
from kdmesh.auth.config import ServerTlsConfig
from kdmesh.auth.watched import Unreadable, Watched, read_bytes
from kdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCertificate:
    """What a server shows, and whom it believes; all PEM."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    expires_at_s: float  # Unix time; of the chain's certificate that ends first
    context: ssl.SSLContext  # the same, for HTTP; a client need not show a certificate there


def watch_certificate(tls: ServerTlsConfig, on_failure: Callable[[], None]) -> Watched[ServerCertificate]:
    """The server's certificate as its files are now. Raises ConfigError when they cannot be used at first."""
    paths = [path for path in (tls.cert, tls.key, tls.client_ca) if path is not None]
    return Watched(paths, lambda: read_certificate(tls), on_failure=on_failure)


def read_certificate(tls: ServerTlsConfig) -> ServerCertificate:
    """Raises ConfigError when the files cannot be read, or the key is not the certificate's."""
    context, chain = _context(tls), read_bytes(tls.cert)
    ends_s = expires_at_s(chain)
    if ends_s is None:
        raise ConfigError(f"{tls.cert} holds no BEGIN CERTIFICATE; openssl x509 without -trustout writes one")
    return ServerCertificate(
        chain=chain,
        key=read_bytes(tls.key),
        client_ca=None if tls.client_ca is None else read_bytes(tls.client_ca),
        expires_at_s=ends_s,
        context=context,
    )


def following(certificate: Watched[ServerCertificate]) -> ssl.SSLContext:
    """A context for a listener that shows the certificate as it is at every handshake."""
    context = certificate.current().context

    def swap(handshake: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        handshake.context = certificate.current().context

    context.sni_callback = swap
    return context


def peer_names(certificate: dict[str, Any] | None) -> Sequence[str]:
    """The names in what `getpeercert` returned: subject alternative names in order, then the common name."""
    if not certificate:
        return ()
    told = certificate.get("subjectAltName", ())
    alternatives = [value for _, value in told if isinstance(value, str)]  # that of a directory has parts, and no text
    common = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return (*alternatives, *common)


def _context(tls: ServerTlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(tls.cert, lambda: context.load_cert_chain(tls.cert, tls.key, password=_no_password(tls.key)))
    if tls.client_ca is not None:
        client_ca = tls.client_ca
        _load(client_ca, lambda: context.load_verify_locations(client_ca))
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _load(path: Path, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise ConfigError(f"{path} cannot be used for TLS: {error.reason or error}") from None
    except OSError as error:
        raise Unreadable(f"cannot read {path} or what belongs to it: {error.strerror or error}") from None


def _no_password(key: Path) -> Callable[[], str]:
    """Instead of asking for it at the terminal."""

    def refuse() -> str:
        raise ConfigError(f"{key} is encrypted; give a key without a password, in a file that only the server can read")

    return refuse
