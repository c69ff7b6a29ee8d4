"""How a server knows who calls it, and what a client shows of itself, as configurations say."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdmesh.auth.identity import Name, Role
from kdmesh.config import StrictModel

# Not HS256 and its kin: what verifies such a token can also make it.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "ES256K", "EdDSA"]
_JWKS_URL = r"^(https://\S+|http://(127\.0\.0\.1|\[::1\]|localhost)(:\d+)?(/\S*)?)$"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address, as far as its text tells."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class RolesConfig(StrictModel):
    """From names to roles."""

    roles: dict[Name, Role] = Field(default_factory=dict)
    """The role of each name."""

    default_role: Role | None = None
    """The role of names that `roles` lacks; null turns them away."""

    def role_of(self, name: str) -> Role | None:
        """None for a name that is turned away."""
        return self.roles.get(name, self.default_role)


class JwtConfig(RolesConfig):
    """JSON web tokens that somebody else issues; needs the extra kdmesh[jwt]."""

    issuer: str = Field(min_length=1)
    """What the claim iss must be."""

    audience: str = Field(min_length=1)
    """What the claim aud must hold."""

    key: Path | None = None
    """PEM file of the public key; read again when it changes."""

    jwks: Path | None = None
    """JSON file with a set of public keys; read again when it changes."""

    jwks_url: Annotated[str, Field(pattern=_JWKS_URL)] | None = None
    """Where the set of public keys is fetched: https, or http on this machine."""

    jwks_ca: Path | None = None
    """PEM file of the authorities that vouch for `jwks_url`; null takes the system's."""

    algorithms: tuple[Algorithm, ...] = Field(("RS256", "ES256"), min_length=1)
    """Signatures that are accepted; only those whose key can be public."""

    name_claim: str = "sub"
    """Claim that holds the name of the job or person."""

    role_claim: str | None = None
    """Claim that holds the role; null, or a token without it: `roles` decides by the name."""

    leeway_s: float = Field(10.0, ge=0, le=300)
    """How far the clocks of issuer and server may be apart."""

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> JwtConfig:
        named = [name for name in ("key", "jwks", "jwks_url") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"exactly one of key, jwks and jwks_url must be set, not {' and '.join(named) or 'none'}")
        if self.jwks_ca is not None and self.jwks_url is None:
            raise ValueError("jwks_ca needs jwks_url")
        return self


class CertificatesConfig(RolesConfig):
    """Client certificates that `tls.client_ca` vouches for. A name is a subject alternative name, else the common
    name; of several, the first that has a role."""


class AuthConfig(StrictModel):
    """Where identities come from; a caller needs one of them."""

    tokens: Path | None = None
    """YAML or JSON file of bearer tokens: see docs/security.md. Read again when it changes."""

    jwt: JwtConfig | None = None
    """JSON web tokens."""

    certificates: CertificatesConfig | None = None
    """Client certificates; needs tls.client_ca."""

    @model_validator(mode="after")
    def _some_source(self) -> AuthConfig:
        if self.tokens is None and self.jwt is None and self.certificates is None:
            raise ValueError("none of tokens, jwt and certificates is set: nobody could be told from anybody")
        return self


class ServerTlsConfig(StrictModel):
    """The server's certificate, for gRPC and REST; all files are read again when they change."""

    cert: Path
    """PEM file: the certificate, then those between it and its authority."""

    key: Path
    """PEM file of its private key."""

    client_ca: Path | None = None
    """PEM file of the authorities of clients. Set, gRPC refuses clients without a certificate; REST does not."""


class ClientTlsConfig(StrictModel):
    """How a client knows its server, and what it shows of itself; read whenever a connection is opened."""

    ca: Path | None = None
    """PEM file of the authorities that vouch for the server; null takes those of gRPC."""

    cert: Path | None = None
    """PEM file of the client's own certificate, where the server asks for one."""

    key: Path | None = None
    """PEM file of its private key."""

    server_name: str | None = None
    """The name in the server's certificate, where the address is another."""

    @model_validator(mode="after")
    def _whole_pair(self) -> ClientTlsConfig:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together: set both or neither")
        return self


class AccessConfig(StrictModel):
    """How a client gets in."""

    token_file: Path | None = None
    """File that holds the bearer token and nothing else; read again when it changes."""

    tls: ClientTlsConfig | None = None
    """Encrypt, and know the server by its certificate; null speaks in the clear."""

    plaintext_token: bool = False
    """Send the token in the clear to other machines too: only where something else encrypts, as a service mesh does."""

    def refusal(self, address: str) -> str | None:
        """Why host:port must not be connected to in this way, as a sentence; None when it may."""
        is_safe = self.token_file is None or self.tls is not None or self.plaintext_token
        if is_safe or is_loopback(address.removeprefix("dns:///").rpartition(":")[0]):
            return None
        return (
            f"{address} is not on this machine, and without tls the token would travel in the clear: set access.tls, "
            "or access.plaintext_token where something else encrypts"
        )


OPEN_ACCESS = AccessConfig()
"""For servers that ask nobody who they are."""
