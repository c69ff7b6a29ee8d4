"""Shared memory that one process writes; whoever gets its descriptor can only read.

A segment is an anonymous memfd: it has no name in any file system, so nothing can be
left behind, and it ends with its last descriptor and mapping. FUTURE_WRITE forbids every
*later* writable mapping, so whoever is to write a segment maps it while it is made: the process
that makes it, and the processes that a `SegmentWriter` speaks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import mmap
import os
from collections.abc import Callable
from typing import Protocol

from kdmesh.allowance import available_bytes
from kdmesh.errors import EngineFailure

_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python has no name for it
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _F_SEAL_FUTURE_WRITE
# mmap.madvise keeps the interpreter lock; in steps, other threads get their turn.
_PREFAULT_STEP_BYTES = 2 * 2**20

_numbers = itertools.count(1)


class Segment:
    """One segment in the process that made it.

    `fd` is good for passing on; it and the mapping belong to the segment. No other segment
    of this process ever has its `number`.
    """

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.number = next(_numbers)
        self.size_bytes = len(mapping)
        self.writable = memoryview(mapping)
        self.is_closed = False
        self.before_close: list[Callable[[Segment], None]] = []
        """Whoever knows the mapping's address must let go of it when called."""
        self._mapping = mapping

    def close(self) -> None:
        """Give up descriptor and mapping; readers keep theirs, and a view that still lives keeps this one."""
        self.is_closed = True
        for let_go in self.before_close:
            let_go(self)
        os.close(self.fd)
        with contextlib.suppress(BufferError):
            self.writable.release()
            self._mapping.close()


class SegmentWriter(Protocol):
    """Other processes that write segments too. Called from any thread; blocks."""

    def adopt(self, segment: Segment) -> None:
        """Return when they have mapped a segment that is not sealed yet.

        Raises:
            OSError: they have not, and will not.
        """

    def drop(self, segment: Segment) -> None:
        """They write this segment no more."""


def whole_pages(size_bytes: int) -> int:
    """`size_bytes` rounded up to pages."""
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def require_available(size_bytes: int) -> None:
    """Raises OSError when the machine, or the container, has less memory than that to give."""
    available = available_bytes()
    if size_bytes > available:
        raise OSError(errno.ENOMEM, f"{size_bytes} bytes of memory are wanted, {available} are available")


def create_segment(size_bytes: int, writer: SegmentWriter | None = None) -> Segment:
    """A sealed segment of at least `size_bytes` (whole pages) of zeros, that `writer` may write too.

    Every page is touched now: the first touch is about ten times as slow as any later one. Blocks for that long.

    Raises:
        OSError: there is not enough memory, or not enough descriptors, or the writer has failed.
    """
    size_bytes = whole_pages(size_bytes)
    require_available(size_bytes)
    fd = os.memfd_create("kdmesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        mapping = mmap.mmap(fd, size_bytes)
        prefault(mapping)
        segment = Segment(fd, mapping)
        if writer is not None:
            writer.adopt(segment)
        # Only now: a mapping made after this seal could not be written.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return segment


async def create_segment_in_thread(size_bytes: int, writer: SegmentWriter | None = None) -> Segment:
    """`create_segment` without blocking the event loop. When cancelled, closes what the thread makes."""
    making = asyncio.ensure_future(asyncio.to_thread(create_segment, size_bytes, writer))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):  # the thread cannot be stopped, only waited for
            (await making).close()
        raise


def map_readonly(fd: int, size_bytes: int) -> mmap.mmap:
    """A reader's mapping of a segment; `fd` stays the caller's and may be closed at once.

    A forked child does not inherit the mapping: its parent answers for what is still read.

    Raises:
        EngineFailure: the descriptor is not a segment of that size with its seals on, so that
            its writer could take the memory away under the reader.
        OSError: it cannot be mapped.
    """
    actual_bytes = os.fstat(fd).st_size
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & _SEALS != _SEALS or actual_bytes != size_bytes:
        raise EngineFailure(
            f"the server lent {actual_bytes} bytes with seals {seals:#x}; announced were {size_bytes} bytes, "
            f"and the seals must include {_SEALS:#x}"
        )
    mapping = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
    mapping.madvise(mmap.MADV_DONTFORK)
    return mapping


def prefault(mapping: mmap.mmap) -> None:
    """Touch every page of a writable mapping, so that no later write waits for one."""
    for start in range(0, len(mapping), _PREFAULT_STEP_BYTES):
        length = min(_PREFAULT_STEP_BYTES, len(mapping) - start)
        try:
            mapping.madvise(_MADV_POPULATE_WRITE, start, length)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the kernel is older than the advice
                raise
            for page in range(start, start + length, mmap.PAGESIZE):
                mapping[page] = 0
