"""Rows that are on their way to a thread that blocks for them."""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from dataclasses import replace

from kdmesh.errors import DeadlineExpired, Unavailable
from kdmesh.rpc.teachers.client import TeacherRows


class ArrivedRows:
    """Rows that nobody has taken yet. Any thread."""

    def __init__(self, rows: TeacherRows) -> None:
        self._rows: TeacherRows | None = rows
        self._lock = threading.Lock()

    def take(self) -> TeacherRows:
        """The rows, once."""
        with self._lock:
            rows, self._rows = self._rows, None
        if rows is None:
            raise RuntimeError("these rows were taken before; keep what wait() returned")
        return rows

    def move(self) -> bool:
        """Copy the rows to memory of this process, so that the server gets its slot back; False if they are taken."""
        with self._lock:
            if self._rows is None:
                return False
            self._rows = replace(self._rows, rows_RD=self._rows.rows_RD.clone(), is_borrowed=False)
            return True


class PendingRows:
    """The rows of one request. If nobody refers to this any more, the request is cancelled and its slot released."""

    def __init__(
        self,
        future: concurrent.futures.Future[ArrivedRows],
        *,
        longest_wait_s: float | None = None,
    ) -> None:
        """`longest_wait_s`: how long `wait` may take; None: as long as the request."""
        self._future = future
        self._longest_wait_s = longest_wait_s
        weakref.finalize(self, future.cancel).atexit = False

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._future.done()

    @property
    def has_failed(self) -> bool:
        """Whether it is known that `wait` will raise."""
        return self.is_done and (self._future.cancelled() or self._future.exception() is not None)

    def wait(self) -> TeacherRows:
        """The rows; to be called once. Blocks no longer than the pool's deadline for a request.

        The memory may be the server's: drop the tensor, and every view of it, when it is used up.

        Raises:
            DeadlineExpired: no teacher answered in time.
            RpcError: the request was refused or failed.
        """
        try:
            return self._future.result(self._longest_wait_s).take()
        except TimeoutError:
            self._future.cancel()
            raise DeadlineExpired(f"no teacher has answered within {self._longest_wait_s:g} s") from None
        except concurrent.futures.CancelledError:
            raise Unavailable("the request was given up, or the connection to the teachers closed") from None
