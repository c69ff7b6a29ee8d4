"""Where Prometheus reads how a run goes."""

from __future__ import annotations

import socket

from pydantic import Field

from kdmesh.config import StrictModel
from kdmesh.errors import ConfigError


class MetricsConfig(StrictModel):
    """An HTTP endpoint of the first rank, which shows figures of the run to whoever reaches it, and nothing else."""

    port: int = Field(ge=0, le=65535)
    """Port of /metrics; 0 takes any free one, which the log names."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines read, and :: those with IPv6, too."""

    linger_s: float = Field(30.0, ge=0)
    """How long a run whose loss is not finite waits with its end until Prometheus has read that."""

    @property
    def family(self) -> socket.AddressFamily:
        """Of `host`."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def refusal(self, error: OSError) -> ConfigError:
        """What to say when the port is not to be had."""
        return ConfigError(f"metrics: cannot listen on {self.host}:{self.port}: {error.strerror or error}")

    def refuse_taken(self) -> None:
        """Raises ConfigError when the port is in use, or the address is not this machine's."""
        with socket.socket(self.family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                trial.bind((self.host, self.port))
            except OSError as error:
                raise self.refusal(error) from None
