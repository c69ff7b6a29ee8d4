"""Where a server listens, as its configuration says."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kdmesh.config import StrictModel

Port = Annotated[int, Field(ge=0, le=65535)]


class ListenConfig(StrictModel):
    """Where the server listens, and how it ends."""

    host: str = "127.0.0.1"
    """Address to listen on. Loopback by default: there is no authentication yet."""

    port: Port
    """gRPC port; 0 takes any free one."""

    rest_port: Port
    """Port of /healthz, /readyz, /metrics and /v1; 0 takes any free one."""

    drain_s: float = Field(30.0, ge=0)
    """After SIGTERM, how long running requests may take to finish."""
