"""Rows that were computed before: looked up when a request comes, copied to its slot instead of computed again."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto

from kdmesh.types import TokenSequence
from kdmesh_teacher.cache import entry_file
from kdmesh_teacher.cache.directory import RowDirectory
from kdmesh_teacher.cache.keys import RowKeys
from kdmesh_teacher.cache.memory import KeptRows, MemoryTier, copy_of
from kdmesh_teacher.cache.report import CacheState

log = logging.getLogger(__name__)

# Apart, so that a slow disk does not hold up who needs nothing from it.
_COPYING_THREADS = 2
_READING_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What the cache had of a request when it came."""

    keys: tuple[bytes, ...]  # of each sequence
    is_kept: tuple[bool, ...]

    @property
    def has_all(self) -> bool:
        """Whether nothing need be computed."""
        return all(self.is_kept)


class _Recalled(Enum):
    """What came of copying kept rows to a slot."""

    GONE = auto()  # they had to go meanwhile
    CORRUPT = auto()
    UNREADABLE = auto()  # for a reason that may pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One sequence's share of a slot."""

    key: bytes
    is_kept: bool  # to be copied there; else it was computed there
    out: memoryview
    kept: KeptRows | None  # where the rows are in memory; None: in the directory, if anywhere


class RowCache:
    """Two tiers, either of which may be missing. Belongs to one event loop; bytes are copied in threads."""

    def __init__(self, keys: RowKeys, memory: MemoryTier | None, directory: RowDirectory | None) -> None:
        self._keys = keys
        self._memory = memory
        self._directory = directory
        self._corrupt = 0
        self._copying = ThreadPoolExecutor(_COPYING_THREADS, thread_name_prefix="cache-copier")
        self._reading = ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="cache-reader")

    def find(
        self, job: str, weight_version: int, sequences: Sequence[TokenSequence], layers: Sequence[int] = ()
    ) -> Found:
        """What is kept of these sequences' rows, with the outputs of these layers, that this job may have."""
        keys = tuple(self._keys.key(job, weight_version, sequence, layers) for sequence in sequences)
        return Found(keys=keys, is_kept=tuple(self._has(key) for key in keys))

    def find_again(self, found: Found) -> Found:
        """The same request a while later: others may have asked for its sequences meanwhile."""
        is_kept = (kept or self._has(key) for key, kept in zip(found.keys, found.is_kept, strict=True))
        return Found(keys=found.keys, is_kept=tuple(is_kept))

    async def complete(self, found: Found, outs: Sequence[memoryview]) -> bool:
        """Copy what is kept to the slot, and keep what was computed there.

        Args:
            outs: each sequence's share of the slot.

        Returns:
            Whether all rows are there. False: something was gone or corrupt, and is not kept any more, or could
            not be read, and is not found until it was computed.
        """
        parts = [
            _Part(key=key, is_kept=is_kept, out=out, kept=self._in_memory(key))
            for key, is_kept, out in zip(found.keys, found.is_kept, outs, strict=True)
        ]
        is_read = any(part.is_kept and part.kept is None for part in parts)
        threads = self._reading if is_read else self._copying
        results = await asyncio.get_running_loop().run_in_executor(threads, self._copy, parts)
        settled = [self._settle(part, result) for part, result in zip(parts, results, strict=True)]
        return all(settled)

    def state(self) -> CacheState:
        """As it is now."""
        directory = self._directory
        return CacheState(
            memory=None if self._memory is None else self._memory.state(),
            directory=None if directory is None else directory.state(),
            corrupt=self._corrupt,
            skipped=0 if directory is None else directory.skipped,
            refusal="" if directory is None else directory.refusal,
        )

    async def close(self) -> None:
        """Return when everything is written that waits."""
        for threads in (self._copying, self._reading):
            await asyncio.to_thread(threads.shutdown)
        if self._directory is not None:
            await self._directory.close()

    def _has(self, key: bytes) -> bool:
        return any(key in tier for tier in (self._memory, self._directory) if tier is not None)

    def _in_memory(self, key: bytes) -> KeptRows | None:
        kept = None if self._memory is None else self._memory.get(key)
        return self._directory.waiting(key) if kept is None and self._directory is not None else kept

    # In a thread

    def _copy(self, parts: Sequence[_Part]) -> list[KeptRows | _Recalled | None]:
        """For each part a copy that may be kept, or why its rows are not in the slot."""
        return [self._recall(part) if part.is_kept else copy_of(part.out) for part in parts]

    def _recall(self, part: _Part) -> KeptRows | _Recalled | None:
        if part.kept is not None:
            return None if part.kept.write_to(part.out) else _Recalled.CORRUPT
        if self._directory is None:
            return _Recalled.GONE
        try:
            self._directory.read(part.key, part.out)
        except FileNotFoundError:
            return _Recalled.GONE
        except entry_file.BadEntry as error:
            log.warning("cache entry is corrupt", extra={"key": part.key.hex(), "reason": str(error)})
            return _Recalled.CORRUPT
        except OSError as error:
            log.warning("cache entry cannot be read now", extra={"key": part.key.hex(), "reason": str(error)})
            return _Recalled.UNREADABLE
        return None if self._memory is None else copy_of(part.out)

    # Afterwards, on the loop

    def _settle(self, part: _Part, result: KeptRows | _Recalled | None) -> bool:
        if result is _Recalled.UNREADABLE and self._directory is not None:
            self._directory.pass_over(part.key)
            return False
        if isinstance(result, _Recalled):
            self._drop(part.key)
            self._corrupt += result is _Recalled.CORRUPT
            return False
        if result is not None and self._memory is not None:
            self._memory.put(part.key, result)
        if self._directory is not None:
            if part.is_kept:
                self._directory.use(part.key)
            elif result is not None:
                self._directory.put(part.key, result)
        return True

    def _drop(self, key: bytes) -> None:
        if self._memory is not None:
            self._memory.drop(key)
        if self._directory is not None:
            self._directory.drop(key)


def shares(out: memoryview, sequences: Sequence[TokenSequence], *, row_bytes: int) -> Iterator[memoryview]:
    """Each sequence's part of a slot that holds all their rows."""
    ends = itertools.accumulate((sequence.num_rows * row_bytes for sequence in sequences), initial=0)
    return (out[begin:end] for begin, end in itertools.pairwise(ends))
