"""A rollout server, from its parts to the life that every server has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from kdmesh.serving import lifecycle
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.http import rest
from kdmesh.serving.jobs.file import open_jobs
from kdmesh.serving.security import open_security
from kdmesh.serving.server_families import ServerCollector
from kdmesh.v1.rollout_pb2_grpc import add_RolloutServicer_to_server
from kdmesh_rollout.config import RolloutConfig
from kdmesh_rollout.engine import Engine
from kdmesh_rollout.metrics import Metrics
from kdmesh_rollout.parts import Parts
from kdmesh_rollout.routes import add_routes
from kdmesh_rollout.servicer import Servicer
from kdmesh_rollout.start import start

SERVICE = "kdmesh.v1.Rollout"


async def serve(
    config: RolloutConfig,
    engine: Engine,
    thread: EngineThread,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[Addresses], None] = lambda addresses: None,
) -> None:
    """Serve until `stop` is set, then drain; see kdmesh.serving.lifecycle.

    Args:
        config: what to serve and where.
        engine: not loaded yet.
        thread: where the engine lives; the caller closes it.
        stop: ends the server, also while it loads.
        on_ready: called once requests are taken.

    Raises:
        ConfigError: a file of `server.auth`, `server.tls` or `jobs` cannot be used.
    """
    gate, metrics = Gate[Parts](), Metrics()
    security = open_security(config.server, metrics)
    jobs = open_jobs(config.jobs, metrics)
    metrics.registry.register(ServerCollector("kdmesh_rollout", gate, security.certificate))
    servicer = Servicer(gate, metrics, max_request_s=config.queue.max_request_s)
    app = rest.build_app("rollout server", gate, metrics.registry, security.authority)
    add_routes(app, gate)

    async def begin(stack: AsyncExitStack, port: int) -> Parts:
        return await start(config, engine, thread, jobs=jobs, metrics=metrics, gate=gate, stack=stack)

    async def drain(parts: Parts) -> None:
        await servicer.outstanding.wait_none()

    service = lifecycle.Service(
        config=config.server,
        security=security,
        grpc_name=SERVICE,
        add_to=lambda server: add_RolloutServicer_to_server(servicer, server),
        app=app,
        gate=gate,
        start=begin,
        drain=drain,
    )
    await lifecycle.serve(service, stop=stop, on_ready=on_ready)
