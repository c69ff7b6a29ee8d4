"""A segment is written by its maker alone, and cannot be taken away from a reader."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdmesh.errors import EngineFailure
from kdmesh.handles.slab import memory
from kdmesh.handles.slab.memory import Segment, create_segment, create_segment_in_thread, map_readonly
from tests.support.descriptors import nothing_left_open

SIZE = 8 * mmap.PAGESIZE


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = create_segment(SIZE)
    yield made
    made.close()


def num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:kdmesh")


def test_reader_sees_what_is_written_later(segment: Segment) -> None:
    mapping = map_readonly(segment.fd, SIZE)
    segment.writable[100:104] = b"rows"
    assert mapping[100:104] == b"rows"


def test_size_is_whole_pages() -> None:
    with contextlib.closing(create_segment(mmap.PAGESIZE + 1)) as made:
        assert made.size_bytes == len(made.writable) == 2 * mmap.PAGESIZE


def test_reader_cannot_write(segment: Segment) -> None:
    mapping = map_readonly(segment.fd, SIZE)
    with pytest.raises(TypeError):
        mapping[0] = 1
    with pytest.raises(PermissionError):
        mmap.mmap(segment.fd, SIZE)
    with pytest.raises(PermissionError):
        os.pwrite(segment.fd, b"x", 0)
    for size in (0, SIZE // 2, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        os.posix_fallocate(segment.fd, 0, 2 * SIZE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    again = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, SIZE)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
    finally:
        os.close(again)
    assert bytes(segment.writable[:1]) == b"\0"


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW])
def test_memory_that_could_be_taken_away_is_not_mapped(seals: int) -> None:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(EngineFailure, match="seals"):
            map_readonly(fd, SIZE)
    finally:
        os.close(fd)


def test_segment_of_another_size_is_not_mapped(segment: Segment) -> None:
    with pytest.raises(EngineFailure, match=str(2 * SIZE)):
        map_readonly(segment.fd, 2 * SIZE)


@pytest.mark.parametrize("has_populate", [True, False])
def test_memory_is_there_before_it_is_used_and_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch, has_populate: bool
) -> None:
    if not has_populate:
        monkeypatch.setattr(memory, "_MADV_POPULATE_WRITE", 10_000)  # EINVAL, as on an old kernel
    size = 64 * 2**20
    gc.collect()
    mappings = num_mappings()
    with nothing_left_open():
        made = create_segment(size)
        assert os.fstat(made.fd).st_blocks * 512 == size
        reader = map_readonly(made.fd, size)
        made.close()
        assert reader[-1] == 0  # a reader keeps it
        del reader
    assert num_mappings() == mappings


def test_memory_that_runs_out_is_told_and_not_touched() -> None:
    class Full(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0, /) -> None:
            raise OSError(errno.ENOMEM, "there is none")

        def __setitem__(self, key: object, value: object) -> None:
            raise AssertionError("the kernel kills who touches a page that it does not have")

    with contextlib.closing(Full(-1, SIZE)) as mapping, pytest.raises(OSError, match="there is none"):
        memory.prefault(mapping)


def test_view_keeps_the_memory_of_a_closed_segment() -> None:
    made = create_segment(SIZE)
    view = made.writable[:4]
    made.close()
    view[:] = b"late"
    assert bytes(view) == b"late"


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(OSError, match="bytes of memory are wanted"):
        create_segment(2**60)


def test_failure_on_the_way_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SEALS", 1 << 30)
    with nothing_left_open(), pytest.raises(OSError):
        create_segment(SIZE)


class OtherProcess:
    """Maps what it is shown, as a process with a descriptor of its own does."""

    def __init__(self) -> None:
        self.mappings: dict[int, mmap.mmap] = {}

    def adopt(self, segment: Segment) -> None:
        self.mappings[segment.number] = mmap.mmap(segment.fd, segment.size_bytes)

    def drop(self, segment: Segment) -> None:
        del self.mappings[segment.number]


class GoneProcess(OtherProcess):
    def adopt(self, segment: Segment) -> None:
        raise ConnectionResetError("the process has ended")


def test_who_maps_a_segment_while_it_is_made_can_write_it_for_ever() -> None:
    other = OtherProcess()
    with contextlib.closing(create_segment(SIZE, other)) as made:
        mapping = map_readonly(made.fd, SIZE)
        other.mappings[made.number][7:11] = b"rows"
        assert mapping[7:11] == made.writable[7:11] == b"rows"
        with pytest.raises(PermissionError):
            mmap.mmap(made.fd, SIZE)


def test_segment_that_its_writer_did_not_map_is_not_made() -> None:
    with nothing_left_open(), pytest.raises(ConnectionResetError):
        create_segment(SIZE, GoneProcess())


async def test_cancelled_creation_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()

    def slow(size_bytes: int, writer: None) -> Segment:
        has_begun.set()
        may_go_on.wait()
        return create_segment(size_bytes)

    monkeypatch.setattr(memory, "create_segment", slow)
    making = asyncio.create_task(create_segment_in_thread(SIZE))
    await asyncio.to_thread(has_begun.wait)
    with nothing_left_open():
        making.cancel()
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await making
