"""Where a server is to be reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a server listens, each host:port."""

    grpc: str
    rest: str
