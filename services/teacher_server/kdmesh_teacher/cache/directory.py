"""Rows in a directory of a local disk, one file for each sequence.

  DIRECTORY/.lock         held by the server that has the directory
  DIRECTORY/ab/abcd...    the rows whose key is abcd... in hexadecimal; see entry_file.py
  DIRECTORY/ab/*.part     being written, or left behind by a server that was killed

The order of use is that of the files' modification times, so that it outlives the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from kdmesh.errors import ConfigError
from kdmesh.file_lock import lock
from kdmesh.serving.lru import LeastRecentlyUsed
from kdmesh_teacher.cache import entry_file
from kdmesh_teacher.cache.keys import KEY_BYTES
from kdmesh_teacher.cache.memory import KeptRows
from kdmesh_teacher.cache.report import TierState

log = logging.getLogger(__name__)

# Rows that wait to be written. A disk that is slower than the engine makes holes in the cache, never a longer wait.
_MAX_BACKLOG_BYTES = 512 * 2**20
_REST_S = 60.0  # after a failed write


class RowDirectory:
    """At most `budget_bytes` of files; made by `opened`. Belongs to one event loop, but for `read`.

    Attributes:
        skipped: entries that were not written.
    """

    def __init__(
        self, path: Path, budget_bytes: int, *, clock: Callable[[], float] = time.monotonic, rest_s: float = _REST_S
    ) -> None:
        self._path = path
        self._files = LeastRecentlyUsed[None](budget_bytes)
        self._unwritten: dict[bytes, KeptRows] = {}  # they wait to be written
        self._unwritten_bytes = 0  # counted along: behind a slow disk wait many small ones
        self._unread = set[bytes]()  # a read failed, and they were not computed since
        self._clock = clock
        self._rest_s = rest_s
        self._rests_until = 0.0
        self._failure = ""
        self.skipped = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")

    def __contains__(self, key: bytes) -> bool:
        return key in self._files and key not in self._unread

    @property
    def refusal(self) -> str:
        """Why nothing is written now; empty: it is."""
        return self._failure if self._clock() < self._rests_until else ""

    def state(self) -> TierState:
        """As it is now; what waits to be written is counted."""
        files = self._files
        return TierState(
            budget_bytes=files.budget_bytes, used_bytes=files.used_bytes, entries=len(files), evicted=files.evicted
        )

    def put(self, key: bytes, rows: KeptRows) -> None:
        """Have rows written, in place of the files that were not used for longest; one that is there stays."""
        self._unread.discard(key)
        if key in self._files or key in self._unwritten:
            return
        size_bytes = len(rows.data)
        is_behind = self._unwritten_bytes + size_bytes > _MAX_BACKLOG_BYTES
        gone = None if self.refusal or is_behind else self._files.add(key, None, entry_file.size_on_disk(size_bytes))
        if gone is None:
            self.skipped += 1
            return
        self._unread.difference_update(gone)
        self._unwritten[key] = rows
        self._unwritten_bytes += size_bytes
        writing = asyncio.get_running_loop().run_in_executor(self._writer, self._write, gone, key, rows)
        writing.add_done_callback(partial(self._written, key))

    def waiting(self, key: bytes) -> KeptRows | None:
        """Rows that are here, but not in their file yet."""
        return self._unwritten.get(key)

    def use(self, key: bytes) -> None:
        """These rows are now the last to go."""
        self._files.use(key)

    def drop(self, key: bytes) -> None:
        """Delete a file, or forget one that is gone."""
        self._files.discard(key)
        self._unread.discard(key)
        asyncio.get_running_loop().run_in_executor(self._writer, self._delete, [key])

    def pass_over(self, key: bytes) -> None:
        """Keep a file that could not be read, and have its rows computed once before it is tried again."""
        self._unread.add(key)

    def read(self, key: bytes, out: memoryview) -> None:
        """As entry_file.read; marks the file as used. From any thread; blocks."""
        path = self._file(key)
        entry_file.read(path, key, out)
        with suppress(OSError):
            os.utime(path)

    def load(self) -> None:
        """Take over what an earlier server left, and remove what it had not finished. Blocks."""
        found = list[tuple[int, bytes, int]]()
        for prefix in range(256):
            found += _entries(self._path / f"{prefix:02x}")
        for _, key, size_bytes in sorted(found):
            gone = self._files.add(key, None, size_bytes)
            self._delete([key] if gone is None else gone)
        self._files.evicted = 0
        log.info("cache found", extra={"entries": len(self._files), "size_bytes": self._files.used_bytes})

    async def wait_written(self) -> None:
        """Return when everything is written that waits."""
        await asyncio.get_running_loop().run_in_executor(self._writer, lambda: None)

    async def close(self) -> None:
        """The same, and no more is written after."""
        await self.wait_written()
        self._writer.shutdown()

    def _file(self, key: bytes) -> Path:
        name = key.hex()
        return self._path / name[:2] / name

    def _write(self, gone: Sequence[bytes], key: bytes, rows: KeptRows) -> None:
        self._delete(gone)
        path = self._file(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        entry_file.write(path, key, rows.data.data, rows.digest)

    def _delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            with suppress(OSError):  # what stays is found at the next start
                self._file(key).unlink(missing_ok=True)

    def _written(self, key: bytes, writing: asyncio.Future[None]) -> None:
        self._unwritten_bytes -= len(self._unwritten.pop(key).data)
        failure = writing.exception()
        if failure is None:
            return
        self._files.discard(key)
        self.skipped += 1
        if not self.refusal:  # once, not for everything that was waiting
            self._failure = f"{self._path} cannot be written: {failure}"
            self._rests_until = self._clock() + self._rest_s
            log.warning("cache stops writing", extra={"reason": self._failure, "for_s": self._rest_s})


@contextmanager
def opened(path: Path, budget_bytes: int) -> Iterator[RowDirectory]:
    """The directory, made if need be, kept from every other server as long as the context lasts. Blocks.

    Raises:
        ConfigError: it cannot be written or locked, another server has it, or the disk has no room for the budget.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (path / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"cache.directory: {path} cannot be written: {error}") from None
    with file:
        lock(file, refusal=f"cache.directory: another server has {path}; each needs one of its own")
        rows = RowDirectory(path, budget_bytes)
        try:
            rows.load()
        except OSError as error:
            raise ConfigError(f"cache.directory: {path} cannot be read: {error}") from None
        room_bytes = shutil.disk_usage(path).free + rows.state().used_bytes
        if budget_bytes > room_bytes:
            raise ConfigError(
                f"cache.directory_mib: {budget_bytes / 2**20:.0f} MiB are more than the {room_bytes / 2**20:.0f} MiB "
                f"that {path} has room for, what is cached there included"
            )
        yield rows


def _entries(directory: Path) -> Iterator[tuple[int, bytes, int]]:
    """When each entry was used last, its key, and the bytes that it takes; removes what was not finished."""
    try:
        files = list(os.scandir(directory))
    except FileNotFoundError:
        return
    for file in files:
        if file.name.endswith(entry_file.UNFINISHED):
            os.unlink(file.path)
        elif len(file.name) == 2 * KEY_BYTES:
            with suppress(ValueError):  # not ours
                key, stat = bytes.fromhex(file.name), file.stat()
                yield stat.st_mtime_ns, key, entry_file.size_on_disk(stat.st_size - entry_file.HEADER_BYTES)
