"""The life of a teacher server: listen, start, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kdmesh.rpc import server as rpc_server
from kdmesh.serving.engine_thread import EngineThread
from kdmesh.v1.teacher_pb2_grpc import add_TeacherServicer_to_server
from kdmesh_teacher import rest
from kdmesh_teacher.config import ServerConfig, TeacherConfig
from kdmesh_teacher.engine import Engine
from kdmesh_teacher.gate import Gate, Parts
from kdmesh_teacher.metrics import Gauges, Metrics
from kdmesh_teacher.servicer import Servicer
from kdmesh_teacher.start import start

log = logging.getLogger(__name__)

T = TypeVar("T")

SERVICE = "kdmesh.v1.Teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a server listens, each host:port."""

    grpc: str
    rest: str


async def serve(
    config: TeacherConfig,
    engine: Engine,
    thread: EngineThread,
    *,
    directory: Path,
    stop: asyncio.Event,
    on_listen: Callable[[Addresses], None] = lambda addresses: None,
    on_ready: Callable[[Addresses], None] = lambda addresses: None,
) -> None:
    """Serve until `stop` is set, then drain.

    Args:
        config: what to serve and where.
        engine: not loaded yet.
        thread: where the engine lives; the caller closes it.
        directory: for the broker's socket; it must exist.
        stop: ends the server, also while it loads.
        on_listen: called once the ports are taken; every rpc answers Unavailable then.
        on_ready: called once requests are taken.

    Raises:
        ConfigError: a port, the model or the memory is not to be had.
        EngineFailure: the engine does not, or no longer, compute what it must.
    """
    gate, metrics = Gate(), Metrics()
    servicer = Servicer(gate, metrics)
    async with contextlib.AsyncExitStack() as stack:
        rpc, addresses = await stack.enter_async_context(_listening(config.server, servicer, gate, metrics))
        log.info("listening", extra={"grpc": addresses.grpc, "rest": addresses.rest})
        on_listen(addresses)
        socket_path = directory / f"teacher-{rpc.port}.sock"
        starting = start(config, engine, thread, socket_path=socket_path, metrics=metrics, stack=stack)
        parts = await _before(stop, starting)
        if parts is None:
            return
        # Streams end before the memory that they read.
        stack.push_async_callback(rpc.stop)
        metrics.watch(lambda: _gauges(parts))
        running = asyncio.create_task(parts.scheduler.run(), name="scheduler")
        stack.push_async_callback(_cancel, running)
        gate.open(parts)
        await rpc.report(is_serving=True)
        on_ready(addresses)
        log.info("ready", extra={"grpc": addresses.grpc, "rest": addresses.rest, "model": parts.model.name})
        await _before(stop, asyncio.shield(running))
        gate.drain()
        await rpc.report(is_serving=False)
        await _drain(parts, servicer, config.server.drain_s)


@contextlib.asynccontextmanager
async def _listening(
    config: ServerConfig, servicer: Servicer, gate: Gate, metrics: Metrics
) -> AsyncIterator[tuple[rpc_server.RpcServer, Addresses]]:
    host = f"[{config.host}]" if ":" in config.host else config.host
    app = rest.build_app(gate, metrics.registry)
    async with (
        rpc_server.serving(
            SERVICE,
            lambda server: add_TeacherServicer_to_server(servicer, server),
            host=config.host,
            port=config.port,
        ) as rpc,
        rest.serving(app, host=config.host, port=config.rest_port) as rest_port,
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


async def _drain(parts: Parts, servicer: Servicer, drain_s: float) -> None:
    """Wait until everything that was promised has been answered and fetched, or the time is up."""
    log.info("draining", extra={"drain_s": drain_s})
    try:
        async with asyncio.timeout(drain_s):
            await servicer.outstanding.wait_none()
            await parts.store.wait_collected()
            await servicer.outstanding.wait_none()  # reads that began meanwhile
    except TimeoutError:
        left = parts.scheduler.queue.num_requests
        log.warning("drain time is over", extra={"drain_s": drain_s, "waiting_requests": left})


def _gauges(parts: Parts) -> Gauges:
    queue = parts.scheduler.queue
    return Gauges(slab=parts.store.snapshot(), waiting_tokens=queue.num_tokens, waiting_requests=queue.num_requests)
