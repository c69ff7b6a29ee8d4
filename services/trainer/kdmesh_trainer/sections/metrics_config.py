"""Where Prometheus reads how a run goes."""

from __future__ import annotations

from pydantic import Field

from kdmesh.config import StrictModel


class MetricsConfig(StrictModel):
    """An HTTP endpoint of the first rank, which shows figures of the run to whoever reaches it, and nothing else."""

    port: int = Field(ge=0, le=65535)
    """Port of /metrics; 0 takes any free one, which the log names."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines read, and :: those with IPv6, too."""

    linger_s: float = Field(30.0, ge=0)
    """How long a run whose loss is not finite waits with its end until Prometheus has read that."""
