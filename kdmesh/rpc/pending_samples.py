"""Samples that are on their way to a thread that blocks for them."""

from __future__ import annotations

import concurrent.futures
import threading
import weakref

from kdmesh.errors import Unavailable
from kdmesh.types import Sample


class ArrivedSamples:
    """What has come of one request. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: dict[int, Sample] = {}
        self._new: list[tuple[int, Sample]] = []

    def add(self, index: int, sample: Sample) -> None:
        """Sample number `index` has come."""
        with self._lock:
            self._samples[index] = sample
            self._new.append((index, sample))

    def take_new(self) -> list[tuple[int, Sample]]:
        """Those that this has not returned before, as they came."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def in_order(self) -> list[Sample]:
        """All that have come, by index."""
        with self._lock:
            return [self._samples[index] for index in sorted(self._samples)]


class PendingSamples:
    """The samples of one prompt. If nobody refers to this any more, what is still missing is aborted."""

    def __init__(self, future: concurrent.futures.Future[None], arrived: ArrivedSamples) -> None:
        self._future = future
        self._arrived = arrived
        weakref.finalize(self, future.cancel).atexit = False

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._future.done()

    def is_done_before(self, other: concurrent.futures.Future[None]) -> bool:
        """Block until this or `other` is done; whether this is."""
        concurrent.futures.wait((self._future, other), return_when=concurrent.futures.FIRST_COMPLETED)
        return self.is_done

    def poll(self) -> list[tuple[int, Sample]]:
        """Samples with their index that have come since the last call. Does not block, and raises nothing."""
        return self._arrived.take_new()

    def wait(self) -> list[Sample]:
        """All samples, by index. Blocks no longer than the pool's deadline for a request.

        Raises:
            DeadlineExpired: the last one did not come in time.
            ModelMismatch: every server that answers has older weights than the request wants.
            RpcError: the request was refused or failed.
        """
        try:
            self._future.result()
            return self._arrived.in_order()
        except concurrent.futures.CancelledError:
            raise Unavailable("the connection to the rollout servers was closed") from None
