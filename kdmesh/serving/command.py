"""The command line of a server, and the process around it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from kdmesh import log
from kdmesh.config import StrictModel, config_parser, load
from kdmesh.errors import ConfigError, KdmeshError
from kdmesh.interrupt import INTERRUPTED
from kdmesh.open_files import raise_open_files
from kdmesh.outputs import say_error
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.engine.thread import EngineThread

M = TypeVar("M", bound=StrictModel)
M_contra = TypeVar("M_contra", bound=StrictModel, contravariant=True)

_BAD_CONFIG, _FAILED = 2, 1
_THREAD_ENDS_S = 1.0


class Run(Protocol[M_contra]):
    """Serves until a signal comes. Blocks."""

    def __call__(self, config: M_contra, thread: EngineThread, on_ready: Callable[[Addresses], None]) -> None:
        """`thread` is for the engine; `on_ready` is to be called once requests are taken."""
        ...


def main(model: type[M], run: Run[M], *, package: str, service: str, description: str) -> None:
    """Parse, validate, serve until SIGTERM or SIGINT.

    Exit status: 0 after a drain, 1 when the server failed, 2 when the configuration was refused, 130 when Ctrl-C came
    before it served.

    Args:
        model: of the configuration.
        run: imports what is heavy only when it is called: --check and a bad configuration must not wait for that.
        package: run as `python -m package`.
        service: for the log.
        description: what the command does.
    """
    arguments = _parser(package, description).parse_args()
    try:
        raise_open_files()
        config = load(model, arguments.config, arguments.set)
        if not arguments.check:
            log.configure(service=service)
            _run(partial(run, config), arguments.ready_file)
    except ConfigError as error:
        say_error(error)
        sys.exit(_BAD_CONFIG)
    except KeyboardInterrupt:  # before it serves
        sys.exit(INTERRUPTED)
    except KdmeshError as error:
        say_error(error)
        sys.exit(_FAILED)


def stop_on_signals(*, on_second: Callable[[], None] = lambda: None) -> asyncio.Event:
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


def _parser(package: str, description: str) -> argparse.ArgumentParser:
    parser = config_parser(package, description)
    parser.add_argument(
        "--ready-file", type=Path, help="written as JSON {grpc, rest, pid} when requests are taken, removed at the end"
    )
    parser.add_argument("--check", action="store_true", help="only validate the configuration")
    return parser


def _run(run: Callable[[EngineThread, Callable[[Addresses], None]], None], ready_file: Path | None) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would print, we raise; read when grpc is imported
    thread = EngineThread()
    try:
        run(thread, partial(_write_ready, ready_file))
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
        is_ended = thread.close(_THREAD_ENDS_S)
    if not is_ended:
        # Stopped in the middle of a long call. The interpreter must not be torn down under it.
        os._exit(0)


def _write_ready(path: Path | None, addresses: Addresses) -> None:
    """Atomically: whoever sees the file sees all of it."""
    if path is None:
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(
        json.dumps({"grpc": addresses.grpc, "rest": addresses.rest, "pid": os.getpid()}), encoding="utf-8"
    )
    unfinished.replace(path)
