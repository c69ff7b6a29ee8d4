"""The command line of the teacher server."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from kdmesh import log
from kdmesh.config import load
from kdmesh.errors import ConfigError, KdmeshError
from kdmesh_teacher.config import TeacherConfig

if TYPE_CHECKING:
    from kdmesh_teacher.lifecycle import Addresses

_BAD_CONFIG, _FAILED = 2, 1
_THREAD_ENDS_S = 1.0


def main() -> None:
    """Parse, validate, serve until SIGTERM or SIGINT.

    Exit status: 0 after a drain, 1 when the server failed, 2 when the configuration was refused.
    """
    arguments = _parser().parse_args()
    try:
        config = load(TeacherConfig, arguments.config, arguments.set)
        if not arguments.check:
            log.configure(service="teacher")
            _run(config, arguments.ready_file)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_BAD_CONFIG)
    except KdmeshError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kdmesh_teacher", description="Serve the hidden states of one frozen model."
    )
    parser.add_argument("config", type=Path, help="YAML file; see kdmesh_teacher/config.py")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; may be repeated"
    )
    parser.add_argument(
        "--ready-file", type=Path, help="written as JSON {grpc, rest, pid} when requests are taken, removed at the end"
    )
    parser.add_argument("--check", action="store_true", help="only validate the configuration")
    return parser


def _run(config: TeacherConfig, ready_file: Path | None) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would print, we raise; read when grpc is imported
    # Not at the top: --check and a bad configuration must not wait for them.
    from kdmesh.serving.engine_thread import EngineThread
    from kdmesh_teacher.build import build_engine
    from kdmesh_teacher.lifecycle import serve
    from kdmesh_teacher.runtime_dir import RuntimeDir, runtime_dir

    thread = EngineThread()
    engine = build_engine(config.engine)

    async def run(directory: RuntimeDir) -> None:
        stop = _stop_on_signals(on_second=directory.remove)
        await serve(
            config,
            engine,
            thread,
            directory=directory.path,
            stop=stop,
            on_ready=lambda addresses: _write_ready(ready_file, addresses),
        )

    try:
        with runtime_dir(config.server.runtime_dir) as directory:
            asyncio.run(run(directory))
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
        is_ended = thread.close(_THREAD_ENDS_S)
    if not is_ended:
        # Stopped in the middle of a long call. The interpreter must not be torn down under it.
        os._exit(0)


def _stop_on_signals(*, on_second: Callable[[], None]) -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; the next signal after that ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def begin_to_stop() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, end_now)

    def end_now(number: int, frame: FrameType | None) -> None:
        on_second()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin_to_stop)
    return stop


def _write_ready(path: Path | None, addresses: Addresses) -> None:
    """Atomically: whoever sees the file sees all of it."""
    if path is None:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(
        json.dumps({"grpc": addresses.grpc, "rest": addresses.rest, "pid": os.getpid()}), encoding="utf-8"
    )
    partial.replace(path)


if __name__ == "__main__":
    main()
