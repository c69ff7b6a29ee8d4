"""The one thread that runs the engine."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class EngineThread:
    """Runs blocking calls one at a time, so that the event loop never waits on a model.

    The thread is a daemon: a call that never returns does not keep the process alive.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def run(self, call: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """What call(*args) returns or raises, computed on the thread.

        Cancelling the future does not stop the call.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = call(*args)
            except Exception as error:  # noqa: BLE001 - whoever awaits the future gets it
                _tell(loop, _fail, future, error)
            else:
                _tell(loop, _succeed, future, result)

        self._calls.put(work)
        return future

    def close(self, wait_s: float) -> bool:
        """End the thread after the calls it was given; False when it still runs one after `wait_s`. Blocks."""
        self._calls.put(None)
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _tell(loop: asyncio.AbstractEventLoop, settle: Callable[..., None], *args: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle, *args)


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
