"""A teacher server, from its parts to the life that every server has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from kdmesh.serving import lifecycle
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.http import rest
from kdmesh.serving.jobs.file import open_jobs
from kdmesh.serving.security import open_security
from kdmesh.serving.server_families import ServerCollector
from kdmesh.v1.teacher_pb2_grpc import add_TeacherServicer_to_server
from kdmesh_teacher.config import TeacherConfig
from kdmesh_teacher.engine import Engine
from kdmesh_teacher.metrics import Gauges, Metrics
from kdmesh_teacher.parts import Parts
from kdmesh_teacher.routes import add_routes
from kdmesh_teacher.servicer import Servicer
from kdmesh_teacher.start import start

SERVICE = "kdmesh.v1.Teacher"


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
    """Serve until `stop` is set, then drain; see kdmesh.serving.lifecycle.

    Args:
        config: what to serve and where.
        engine: not loaded yet.
        thread: where the engine lives; the caller closes it.
        directory: for the broker's socket; it must exist.
        stop: ends the server, also while it loads.
        on_listen: called once the ports are taken; every rpc answers Unavailable then.
        on_ready: called once requests are taken.

    Raises:
        ConfigError: a file of `server.auth`, `server.tls` or `jobs` cannot be used.
    """
    gate, metrics = Gate[Parts](), Metrics()
    security = open_security(config.server, metrics)
    jobs = open_jobs(config.jobs, metrics)
    metrics.registry.register(ServerCollector("kdmesh_teacher", gate, security.certificate))
    servicer = Servicer(gate, metrics)
    app = rest.build_app("teacher", gate, metrics.registry, security.authority)
    add_routes(app, gate)

    async def begin(stack: AsyncExitStack, port: int) -> Parts:
        socket_path = directory / f"teacher-{port}.sock"
        parts = await start(
            config, engine, thread, jobs=jobs, socket_path=socket_path, metrics=metrics, gate=gate, stack=stack
        )
        metrics.watch(lambda: _gauges(parts))
        return parts

    async def drain(parts: Parts) -> None:
        await servicer.outstanding.wait_none()
        await parts.store.wait_collected()
        await servicer.outstanding.wait_none()  # reads that began meanwhile

    service = lifecycle.Service(
        config=config.server,
        security=security,
        grpc_name=SERVICE,
        add_to=lambda server: add_TeacherServicer_to_server(servicer, server),
        app=app,
        gate=gate,
        start=begin,
        drain=drain,
    )
    await lifecycle.serve(service, stop=stop, on_listen=on_listen, on_ready=on_ready)


def _gauges(parts: Parts) -> Gauges:
    queue = parts.scheduler.queue
    states = parts.job_states()
    parts.jobs.forget_silent({state.job for state in states if state.is_present})
    return Gauges(
        jobs=states,
        slab=parts.store.snapshot(),
        waiting_tokens=queue.num_tokens,
        waiting_requests=queue.num_requests,
        cached_tokens=parts.cached_tokens(),
        engine_tokens_per_s=parts.scheduler.load.tokens_per_s or 0.0,
        model=parts.model_at_start.name,
        weight_version=parts.scheduler.weights.version,
        weights_updated_at_s=None if parts.updates is None else parts.updates.updated_at_s,
        cache=None if parts.cache is None else parts.cache.state(),
        asleep=parts.sleep.asleep,
    )
