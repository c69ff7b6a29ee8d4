"""An event loop in a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from itertools import islice
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


class BackgroundLoop:
    """One client's part of the process's background loop: all who need one share a loop and its thread.

    grpc.aio hands the events of all loops of a process to whichever of them wakes first, on its thread
    (PollerCompletionQueue): with several, calls end on loops that are closed already, or worse.
    The thread is a daemon: it never keeps a process alive.
    """

    def __init__(self) -> None:
        self._thread: _Thread | None = _borrow()
        self._loop = self._thread.loop
        self._started: set[asyncio.Task[Any]] = set()
        self._run: set[asyncio.Task[Any]] = set()

    def start(
        self, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Begin work(*args) on the loop, after whatever was started before."""
        return self._begin(functools.partial(work, *args, **kwargs), self._started)

    def run(self, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """What work(*args) returns. Blocks."""
        return self._begin(functools.partial(work, *args, **kwargs), self._run).result()

    def abort(self) -> None:
        """Cancel what was begun by `start` and has not ended. Any thread; does not block."""

        def cancel() -> None:
            for task in tuple(self._started):
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def each(
        self, work: Callable[[Item], Coroutine[Any, Any, T]], items: Iterable[Item], *, at_once: int
    ) -> Iterator[tuple[Item, T]]:
        """Each of the items with what work(item) returns, in the order in which they end; `at_once` are under way.

        What one raises comes after all that ended with it; the others go on until this client is closed.
        """
        coming = iter(items)
        running = {self.start(work, item): item for item in islice(coming, at_once)}
        while running:
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            failed = [future for future in done if future.exception() is not None]
            for future in done.difference(failed):
                yield running.pop(future), future.result()
            for future in failed:
                future.result()
            for item in islice(coming, len(done)):
                running[self.start(work, item)] = item

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._thread is None

    def close(self) -> None:
        """Cancel what this client started and still runs, once; the last client ends the thread. Blocks."""
        assert self._thread is not None
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        _give_back(self._thread)
        self._thread = None

    def _begin(
        self, work: Callable[[], Coroutine[Any, Any, T]], among: set[asyncio.Task[Any]]
    ) -> concurrent.futures.Future[T]:
        async def own() -> T:
            task = asyncio.current_task()
            assert task is not None
            among.add(task)
            try:
                return await work()  # made only now: what is cancelled before it begins leaves no coroutine behind
            finally:
                among.discard(task)

        return asyncio.run_coroutine_threadsafe(own(), self._loop)

    async def _cancel(self) -> None:
        tasks = (*self._started, *self._run)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Thread:
    """The loop, running."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.num_clients = 0
        self._thread = threading.Thread(target=self._run, name="kdmesh clients", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop the loop and end the thread. What still runs is cancelled. Blocks."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())


_lock = threading.Lock()
_shared: _Thread | None = None


def _borrow() -> _Thread:
    global _shared
    with _lock:
        if _shared is None:
            _shared = _Thread()
        _shared.num_clients += 1
        return _shared


def _give_back(thread: _Thread) -> None:
    global _shared
    with _lock:
        thread.num_clients -= 1
        if thread.num_clients > 0:
            return
        _shared = None
    thread.end()
