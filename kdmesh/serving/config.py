"""Where a server listens, as its configuration says."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kdmesh.auth.config import AuthConfig, ServerTlsConfig, is_loopback
from kdmesh.config import StrictModel

Port = Annotated[int, Field(ge=0, le=65535)]


class ListenConfig(StrictModel):
    """Where the server listens, and how it ends."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but loopback needs `auth`, or `allow_anonymous`."""

    port: Port
    """gRPC port; 0 takes any free one."""

    rest_port: Port
    """Port of /healthz, /readyz, /metrics and /v1; 0 takes any free one."""

    drain_s: float = Field(30.0, ge=0)
    """After SIGTERM, how long running requests may take to finish."""

    auth: AuthConfig | None = None
    """How the server knows who calls; null lets anybody who reaches it do anything."""

    tls: ServerTlsConfig | None = None
    """Encrypt gRPC and REST; null speaks in the clear."""

    allow_anonymous: bool = False
    """Listen where others can reach the server, and ask nobody who they are: for networks of trusted users only."""

    @model_validator(mode="after")
    def _knows_who_calls(self) -> ListenConfig:
        if self.auth is None and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and nothing says who may use the server: set "
                "auth, or allow_anonymous on a network of trusted users"
            )
        if self.auth is not None and self.allow_anonymous:
            raise ValueError("auth and allow_anonymous contradict each other")
        has_client_ca = self.tls is not None and self.tls.client_ca is not None
        if self.auth is not None and self.auth.certificates is not None and not has_client_ca:
            raise ValueError("auth.certificates needs tls.client_ca, which vouches for them")
        return self
