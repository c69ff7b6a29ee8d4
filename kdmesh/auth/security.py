"""What guards a server, over gRPC and over HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from kdmesh.auth.authority import Authority
from kdmesh.auth.certificates import ServerCertificate
from kdmesh.auth.watched import Watched


@dataclass(frozen=True, slots=True)
class Security:
    """Who may do what, and the certificate that is shown."""

    authority: Authority
    certificate: Watched[ServerCertificate] | None  # None: plain text


OPEN = Security(Authority(None), None)
"""Anybody may do anything, in plain text."""
