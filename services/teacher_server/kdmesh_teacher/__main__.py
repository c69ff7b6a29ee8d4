"""The command line of the teacher server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kdmesh.interrupt import quiet_interrupt

with quiet_interrupt():
    from kdmesh.allocator import keep_freed_memory
    from kdmesh.serving import command
    from kdmesh.serving.addresses import Addresses
    from kdmesh.serving.engine.thread import EngineThread
    from kdmesh_teacher.config import TeacherConfig

_KEPT_BYTES = 256 * 2**20  # for the messages of the stream door, and the engine's small tensors


def main() -> None:
    """See kdmesh.serving.command."""
    command.main(
        TeacherConfig,
        run,
        package="kdmesh_teacher",
        service="teacher",
        description="Serve the hidden states of one frozen model.",
    )


def run(config: TeacherConfig, thread: EngineThread, on_ready: Callable[[Addresses], None]) -> None:
    """Serve until a signal comes. Blocks."""
    from kdmesh.handles.slab.runtime_dir import RuntimeDir, runtime_dir
    from kdmesh.tracing.spans import tracing
    from kdmesh_teacher.build import build_engine
    from kdmesh_teacher.lifecycle import serve

    keep_freed_memory(_KEPT_BYTES)
    engine = build_engine(config.engine)

    async def until_stopped(directory: RuntimeDir) -> None:
        stop = command.stop_on_signals(on_second=directory.remove)
        await serve(config, engine, thread, directory=directory.path, stop=stop, on_ready=on_ready)

    with tracing("teacher", config.tracing), runtime_dir(config.server.runtime_dir) as directory:
        asyncio.run(until_stopped(directory))


if __name__ == "__main__":
    main()
