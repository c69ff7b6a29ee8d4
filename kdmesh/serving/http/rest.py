"""HTTP for people and platforms: the routes that every server has, and how they are served."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from uvicorn.protocols.http.h11_impl import H11Protocol

from kdmesh.auth.authority import Authority
from kdmesh.auth.certificates import ServerCertificate, following, peer_names
from kdmesh.auth.watched import Watched
from kdmesh.errors import ConfigError, DeadlineExpired, InvalidRequest, RpcError, Unavailable
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.sleep import DRAIN_S, Sleep
from kdmesh.serving.http.access import guard
from kdmesh.serving.http.status_routes import add_status_routes
from kdmesh.serving.jobs.routes import add_job_routes
from kdmesh.types import SleepTag

Json = dict[str, Any]

_MOST_BYTES = 2**20  # of a body, which is read whole before it is looked at

_HTTP = {InvalidRequest: 400, Unavailable: 503, DeadlineExpired: 504}


def build_app(service: str, gate: Gate[Any], registry: CollectorRegistry, authority: Authority) -> FastAPI:
    """What every server shows: health, metrics, status, jobs and sleep.

    The caller adds its own routes; what changes something is no GET, and needs an operator.

    Args:
        service: what people call such a server.
        gate: of `lifecycle.Parts`.
    """
    app = FastAPI(title=f"kdmesh {service}", docs_url=None, redoc_url=None)
    app.router.route_class = _Route
    guard(app, authority)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RpcError)
        headers = {"Retry-After": "1"} if isinstance(error, Unavailable) else None
        return JSONResponse({"reason": str(error)}, status_code=_HTTP[type(error)], headers=headers)

    for kind in _HTTP:
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(RequestValidationError, _misfit)

    @app.get("/healthz")
    async def healthz() -> Json:
        """Whether the process answers at all."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Json:
        """Whether new work is taken."""
        gate.parts_for_new_work()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text. On the event loop, where the numbers change, so it needs no lock."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    _add_sleep_routes(app, lambda: gate.parts().sleep)
    add_job_routes(app, gate.parts)
    add_status_routes(app, gate, service)
    return app


class _Route(APIRoute):
    """One that reads no body of more than _MOST_BYTES, and none that does not say how long it is."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            if "Transfer-Encoding" in request.headers:
                return JSONResponse({"reason": "a body needs a Content-Length"}, status_code=411)
            if (size_bytes := int(request.headers.get("Content-Length", "0"))) > _MOST_BYTES:
                reason = f"a body of {size_bytes} bytes; it may have {_MOST_BYTES}"
                return JSONResponse({"reason": reason}, status_code=413)
            return await handle(request)

        return bounded


async def _misfit(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's answer without the values that were given, which may be none that JSON can say, as NaN is."""
    assert isinstance(error, RequestValidationError)
    told = [{key: details[key] for key in ("type", "loc", "msg")} for details in error.errors()]
    return JSONResponse({"detail": told}, status_code=422)


def _add_sleep_routes(app: FastAPI, sleep: Callable[[], Sleep]) -> None:
    """What the rpcs Sleep and Wake do. `sleep` raises Unavailable while the model loads."""

    @app.get("/reachz")
    async def reachz() -> Json:
        """Whether clients should find the server: it takes new work, or sleeps until one of them wakes it."""
        sleep().require_reachable()
        return {"status": "reachable"}

    @app.post("/v1/sleep")
    async def fall_asleep(
        tags: Annotated[list[SleepTag], Body()], drain_s: Annotated[float, Body(gt=0)] = DRAIN_S
    ) -> Json:
        """Give back what the tags name."""
        return {"asleep": sorted(await sleep().sleep(frozenset(tags), drain_s=drain_s))}

    @app.post("/v1/wake")
    async def wake_up(tags: Annotated[list[SleepTag], Body(embed=True)]) -> Json:
        """Take again what the tags name."""
        return {"asleep": sorted(await sleep().wake(frozenset(tags)))}


@contextlib.asynccontextmanager
async def serving(
    app: FastAPI, *, host: str, port: int, certificate: Watched[ServerCertificate] | None = None
) -> AsyncIterator[int]:
    """Serve `app` from this event loop, encrypted where there is a certificate; yields the port.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    config.load()
    config.ssl = None if certificate is None else following(certificate)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="rest")
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


class _Server(uvicorn.Server):
    """Signals belong to the process's main, not to uvicorn."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not."""
        yield


class _Connection(H11Protocol):
    """Tells the application the names in the client's certificate, which uvicorn does not."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        handshake: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        names = () if handshake is None else peer_names(handshake.getpeercert())
        self.app_state = {**self.app_state, "peer_names": names}


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} for HTTP: {error.strerror or error}") from None
    return listener
