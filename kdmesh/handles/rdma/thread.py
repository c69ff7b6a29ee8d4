"""A thread in which an agent is called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from kdmesh.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class AgentThread:
    """Does one call after another. A call that hangs keeps no process from ending, as it would in a pool."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._is_stopped = False
        threading.Thread(target=self._run, name="rdma", daemon=True).start()

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Do call(*args) after what was submitted before; Unavailable once the thread was stopped."""
        result: Future[T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(call(*args, **kwargs))
            except Exception as error:  # noqa: BLE001  # whoever waits for the result gets it
                result.set_exception(error)

        if self._is_stopped:
            result.set_exception(Unavailable("the RDMA door was closed"))
        else:
            self._calls.put(run)
        return result

    def stop(self) -> None:
        """End after what was submitted."""
        self._is_stopped = True
        self._calls.put(None)

    def _run(self) -> None:
        while (run := self._calls.get()) is not None:
            run()
            del run  # it refers to the agent
