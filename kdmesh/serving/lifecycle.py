"""The life of a server: listen, start, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fastapi import FastAPI

from kdmesh.auth.security import Security
from kdmesh.rpc import server as rpc_server
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.config import ListenConfig
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.sleep import Sleep
from kdmesh.serving.http import rest
from kdmesh.serving.http.status import Working
from kdmesh.serving.jobs.routes import Shared

log = logging.getLogger(__name__)


class Parts(Shared, Protocol):
    """What answers a server's requests once the model is loaded."""

    @property
    def sleep(self) -> Sleep:
        """The server's."""
        ...

    @property
    def run(self) -> Callable[[], Coroutine[Any, Any, None]]:
        """Works until cancelled; begins before the gate opens."""
        ...

    def working(self) -> Working:
        """What the server does, on one screen."""
        ...


P = TypeVar("P", bound=Parts)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service(Generic[P]):
    """What one kind of server adds to the life that all share; P is what answers its requests."""

    config: ListenConfig
    security: Security
    grpc_name: str  # full name of the gRPC service
    add_to: Callable[[Any], None]  # registers the handlers with a gRPC server
    app: FastAPI
    gate: Gate[P]
    start: Callable[[AsyncExitStack, int], Coroutine[Any, Any, P]]  # gets what ends it, and the gRPC port
    drain: Callable[[P], Coroutine[Any, Any, None]]  # returns when all that was promised is done


async def serve(
    service: Service[P],
    *,
    stop: asyncio.Event,
    on_ready: Callable[[Addresses], None],
    on_listen: Callable[[Addresses], None] = lambda addresses: None,
) -> None:
    """Serve until `stop` is set, then drain.

    Args:
        service: what to serve and where.
        stop: ends the server, also while it loads.
        on_ready: called once requests are taken.
        on_listen: called once the ports are taken; every rpc answers Unavailable then.

    Raises:
        ConfigError: a port, the model or the memory is not to be had.
        EngineFailure: the engine does not, or no longer, compute what it must.
    """
    gate = service.gate
    async with AsyncExitStack() as stack:
        rpc, addresses = await stack.enter_async_context(_listening(service))
        log.info("listening", extra={"grpc": addresses.grpc, "rest": addresses.rest})
        on_listen(addresses)
        parts = await _before(stop, service.start(stack, rpc.port))
        if parts is None:
            return
        # Streams end before the memory that they read.
        stack.push_async_callback(rpc.stop)
        running = asyncio.create_task(parts.run(), name="scheduler")
        stack.push_async_callback(_cancel, running)
        gate.open(parts)
        await rpc.report(is_serving=True)
        telling = asyncio.create_task(_tell_health(gate, rpc), name="health")
        stack.push_async_callback(_cancel, telling)
        on_ready(addresses)
        model = parts.working().model
        log.info("ready", extra={"grpc": addresses.grpc, "rest": addresses.rest, "model": model})
        await _before(stop, asyncio.shield(running))
        gate.drain()
        await _drain(service, parts)


async def _tell_health(gate: Gate[Any], rpc: rpc_server.RpcServer) -> None:
    """Let gRPC health checks know what the gate says, whenever that changes, until cancelled."""
    while True:
        gate.changed.clear()
        await rpc.report(is_serving=gate.refusal is None)
        await gate.changed.wait()


@contextlib.asynccontextmanager
async def _listening(service: Service[Any]) -> AsyncIterator[tuple[rpc_server.RpcServer, Addresses]]:
    config = service.config
    host = f"[{config.host}]" if ":" in config.host else config.host
    async with (
        rpc_server.serving(
            service.grpc_name, service.add_to, host=config.host, port=config.port, security=service.security
        ) as rpc,
        rest.serving(
            service.app, host=config.host, port=config.rest_port, certificate=service.security.certificate
        ) as rest_port,
    ):
        yield rpc, Addresses(grpc=f"{host}:{rpc.port}", rest=f"{host}:{rest_port}")


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T | None:
    """What `work` returns, or None when `stop` is set first; then it is cancelled."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _cancel(stopped)
        await _cancel(task)


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel, and wait until it has ended; what it raises is the business of who awaited it."""
    task.cancel()
    await asyncio.wait((task,))


async def _drain(service: Service[P], parts: P) -> None:
    """Wait until everything that was promised is done, or the time is up."""
    drain_s = service.config.drain_s
    log.info("draining", extra={"drain_s": drain_s})
    try:
        async with asyncio.timeout(drain_s):
            await service.drain(parts)
    except TimeoutError:
        left = parts.working().waiting_requests
        log.warning("drain time is over", extra={"drain_s": drain_s, "waiting_requests": left})
