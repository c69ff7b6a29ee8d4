"""gRPC servers: where they listen, their health and reflection, and how they end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kdmesh.auth.certificates import ServerCertificate
from kdmesh.auth.security import OPEN, Security
from kdmesh.auth.watched import Watched
from kdmesh.errors import ConfigError
from kdmesh.rpc.boundary import ErrorBoundary
from kdmesh.rpc.channel import KEEPALIVE_OPTIONS, MAX_MESSAGE_BYTES

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # By default two servers may share a port, and each gets some of the calls.
    ("grpc.so_reuseport", 0),
    *KEEPALIVE_OPTIONS,
    # Clients ping every 15 s; by default more than one ping in 5 minutes without data ends the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


@dataclass(frozen=True, slots=True)
class RpcServer:
    """A server that listens; its services answer, and say Unavailable until they are ready."""

    port: int
    service: str
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer

    async def report(self, *, is_serving: bool) -> None:
        """Tell gRPC health checks, for the service and for the server as a whole."""
        state = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in (health.OVERALL_HEALTH, self.service):
            await self._health.set(name, state)

    async def stop(self) -> None:
        """Refuse new calls and cancel running ones; whoever drains does so before."""
        await self._server.stop(None)


@asynccontextmanager
async def serving(
    service: str,
    add_to: Callable[[grpc.aio.Server], None],
    *,
    host: str,
    port: int,
    security: Security = OPEN,
) -> AsyncIterator[RpcServer]:
    """Listen with one service, health and reflection; reported as not serving at first. On exit, stop at once.

    Args:
        service: full name of the service.
        add_to: registers the service's handlers.
        host: address to listen on.
        port: 0 takes any free one.
        security: who may call what, and the certificate that is shown.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    server = grpc.aio.server(interceptors=(ErrorBoundary(security.authority),), options=_OPTIONS)
    add_to(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if security.certificate is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, _credentials(security.certificate))
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {address} for gRPC: the port is in use, or not ours to take; `server.port` names one"
        ) from None
    listening = RpcServer(bound, service, server, health_servicer)
    await listening.report(is_serving=False)
    await server.start()
    try:
        yield listening
    finally:
        await listening.stop()


def _credentials(certificate: Watched[ServerCertificate]) -> grpc.ServerCredentials:
    """Show the certificate as it is at every handshake."""
    shown = certificate.current()

    def now() -> grpc.ServerCertificateConfiguration:
        return _configuration(certificate.current())

    is_client_asked = shown.client_ca is not None
    return grpc.dynamic_ssl_server_credentials(_configuration(shown), now, is_client_asked)


def _configuration(shown: ServerCertificate) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(shown.key, shown.chain)], shown.client_ca)
