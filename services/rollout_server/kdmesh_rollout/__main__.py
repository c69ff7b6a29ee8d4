"""The command line of the rollout server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kdmesh.interrupt import quiet_interrupt

with quiet_interrupt():
    from kdmesh.serving import command
    from kdmesh.serving.addresses import Addresses
    from kdmesh.serving.engine.thread import EngineThread
    from kdmesh_rollout.config import RolloutConfig


def main() -> None:
    """See kdmesh.serving.command."""
    command.main(
        RolloutConfig,
        run,
        package="kdmesh_rollout",
        service="rollout",
        description="Sample from one model, whose weights a trainer may replace.",
    )


def run(config: RolloutConfig, thread: EngineThread, on_ready: Callable[[Addresses], None]) -> None:
    """Serve until a signal comes. Blocks."""
    from kdmesh.tracing.spans import tracing
    from kdmesh_rollout.build import build_engine
    from kdmesh_rollout.lifecycle import serve

    engine = build_engine(config.engine)

    async def until_stopped() -> None:
        await serve(config, engine, thread, stop=command.stop_on_signals(), on_ready=on_ready)

    with tracing("rollout", config.tracing):
        asyncio.run(until_stopped())


if __name__ == "__main__":
    main()
