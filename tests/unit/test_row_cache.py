"""The cache of rows: what names an entry, what goes first, what a crash or a bad disk leaves."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdmesh.errors import ConfigError
from kdmesh.serving.lru import LeastRecentlyUsed
from kdmesh_teacher.cache import directory as directory_module
from kdmesh_teacher.cache import entry_file
from kdmesh_teacher.cache.config import CacheConfig
from kdmesh_teacher.cache.directory import RowDirectory, opened
from kdmesh_teacher.cache.keys import RowKeys
from kdmesh_teacher.cache.memory import MemoryTier, copy_of
from kdmesh_teacher.cache.row_cache import RowCache
from kdmesh_teacher.config import FakeEngine, TeacherConfig
from kdmesh_teacher.engine import EngineDescription
from kdmesh_teacher.fake_engine import FakeEngine as FakeModel
from tests.support.few_descriptors import no_more_descriptors
from tests.support.teacher_requests import sequence

MIB = 2**20
ENTRY_BYTES = 2 * 4096  # of a file with 4096 bytes of rows and a header


def described(**changes: object) -> EngineDescription:
    model = FakeModel(FakeEngine(kind="fake")).load()
    return replace(model, **changes)


def keys(*, shared: bool | tuple[str, ...] = False, **changes: object) -> RowKeys:
    return RowKeys(described(**changes), shared=shared, computed_by={"engine": "fake"})


def rows(seed: int, size_bytes: int = 4096) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


@asynccontextmanager
async def cache_of(memory: MemoryTier | None = None, directory: RowDirectory | None = None) -> AsyncIterator[RowCache]:
    cache = RowCache(keys(), memory, directory)
    yield cache
    await cache.close()


async def keep(cache: RowCache, seed: int, data: bytes) -> None:
    """As when a request for the sequence of that seed was computed."""
    found = cache.find("job", 1, [sequence(9, seed=seed)])
    assert await cache.complete(found, [memoryview(bytearray(data))])


async def recall(cache: RowCache, seed: int, size_bytes: int = 4096) -> bytes | None:
    """The rows of the sequence of that seed; None when they have to be computed."""
    found = cache.find("job", 1, [sequence(9, seed=seed)])
    out = bytearray(size_bytes)
    if not any(found.is_kept) or not await cache.complete(found, [memoryview(out)]):
        return None
    return bytes(out)


def stored(path: Path) -> list[Path]:
    return sorted(file for file in (path / "cache").rglob("*") if file.is_file() and file.name != ".lock")


# Names


def test_rows_have_the_name_of_everything_they_depend_on() -> None:
    asked = sequence(9)
    other_ids, other_positions = sequence(9, seed=1), sequence(9, every=2)
    same = keys().key("job", 1, asked)
    assert same == keys().key("job", 1, sequence(9))
    different = [
        keys().key("job", 2, asked),
        keys().key("job", 1, other_ids),
        keys().key("job", 1, other_positions),
        keys().key("job", 1, asked, (1,)),
        keys().key("job", 1, asked, (1, 2)),
        keys(model_fingerprint="other").key("job", 1, asked),
        keys(hidden_size=16).key("job", 1, asked),
        keys(is_deterministic=False).key("job", 1, asked),
        RowKeys(described(), shared=False, computed_by={"engine": "other"}).key("job", 1, asked),
    ]
    assert len({same, *different}) == 1 + len(different)


def test_rows_of_one_job_have_another_name_for_another_unless_they_share() -> None:
    def names(shared: bool | tuple[str, ...]) -> list[bytes]:
        return [keys(shared=shared).key(job, 1, sequence(9)) for job in ("a", "b", "c")]

    assert len(set(names(False))) == 3
    assert len(set(names(True))) == 1
    a, b, c = names(("a", "b"))
    assert a == b != c


def test_rows_of_weights_that_are_replaced_have_names_of_one_process() -> None:
    one, other = (keys(architecture_fingerprint="same").key("job", 7, sequence(9)) for _ in range(2))
    assert one != other


# What goes first


def test_what_was_not_used_for_longest_goes_first() -> None:
    lru = LeastRecentlyUsed[str](100)
    for name in (b"a", b"b", b"c"):
        assert lru.add(name, name.decode(), 30) == []
    assert lru.use(b"a") == "a"
    assert lru.add(b"d", "d", 60) == [b"b", b"c"]
    assert (list(lru), lru.used_bytes, lru.evicted) == ([b"a", b"d"], 90, 2)


def test_what_is_larger_than_the_budget_makes_nothing_go() -> None:
    lru = LeastRecentlyUsed[None](100)
    lru.add(b"a", None, 100)
    assert lru.add(b"b", None, 101) is None
    assert list(lru) == [b"a"]


async def test_memory_and_directory_stay_within_their_budgets(tmp_path: Path) -> None:
    with opened(tmp_path / "cache", 3 * ENTRY_BYTES) as files:
        async with cache_of(MemoryTier(2 * 4096), files) as cache:
            for seed in range(5):
                await keep(cache, seed, rows(seed))
        state = cache.state()
    assert state.memory is not None and state.directory is not None
    assert (state.memory.entries, state.memory.used_bytes, state.memory.evicted) == (2, 2 * 4096, 3)
    assert (state.directory.entries, state.directory.used_bytes) == (3, 3 * ENTRY_BYTES)
    assert len(stored(tmp_path)) == 3
    assert state.budget_bytes == 3 * ENTRY_BYTES


# Both tiers


async def test_rows_come_back_as_they_were_from_memory_and_from_the_directory(tmp_path: Path) -> None:
    async with cache_of(memory=MemoryTier(MIB)) as cache:
        await keep(cache, 3, rows(3))
        assert await recall(cache, 3) == rows(3)
        assert await recall(cache, 4) is None
    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            await keep(cache, 3, rows(3))
    with opened(tmp_path / "cache", MIB) as files:  # another server
        async with cache_of(MemoryTier(MIB), files) as cache:
            assert await recall(cache, 3) == rows(3)
            assert cache.state().memory == replace(cache.state().memory, entries=1)  # the next time it is here
            (file,) = stored(tmp_path)
            file.unlink()
            assert await recall(cache, 3) == rows(3)


async def test_damaged_rows_in_memory_are_a_miss() -> None:
    memory = MemoryTier(MIB)
    async with cache_of(memory=memory) as cache:
        await keep(cache, 3, rows(3))
        (key,) = cache.find("job", 1, [sequence(9, seed=3)]).keys
        kept = memory.get(key)
        assert kept is not None
        kept.data[17] ^= 1
        assert await recall(cache, 3) is None
        assert cache.state().corrupt == 1
        assert not any(cache.find("job", 1, [sequence(9, seed=3)]).is_kept)


@pytest.mark.parametrize("damage", ["flip", "cut", "lengthen", "swap", "empty"])
async def test_a_damaged_file_is_a_miss_and_deleted(tmp_path: Path, damage: str) -> None:
    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            await keep(cache, 3, rows(3))
            await keep(cache, 4, rows(4))
    (name,) = (key.hex() for key in cache.find("job", 1, [sequence(9, seed=3)]).keys)
    path = tmp_path / "cache" / name[:2] / name
    content = path.read_bytes()
    other = next(file for file in stored(tmp_path) if file != path)
    path.write_bytes(
        {
            "flip": content[:100] + bytes([content[100] ^ 1]) + content[101:],
            "cut": content[:-1],
            "lengthen": content + b"x",
            "swap": other.read_bytes(),
            "empty": b"",
        }[damage]
    )
    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            assert await recall(cache, 3) is None
            assert cache.state().corrupt == 1
            assert not any(cache.find("job", 1, [sequence(9, seed=3)]).is_kept)
    assert stored(tmp_path) == [other]


async def test_a_file_that_somebody_deleted_is_a_miss_and_no_damage(tmp_path: Path) -> None:
    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            await keep(cache, 3, rows(3))
            await files.wait_written()
            (file,) = stored(tmp_path)
            file.unlink()
            assert await recall(cache, 3) is None
            state = cache.state()
            assert (state.corrupt, state.directory and state.directory.entries) == (0, 0)


@pytest.mark.parametrize("failing", ["open", "read"])
async def test_a_file_that_cannot_be_read_now_is_a_miss_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "the disk does not answer")

    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            await keep(cache, 3, rows(3))
            await files.wait_written()
            with monkeypatch.context() as patch, ExitStack() as stack:
                if failing == "open":
                    stack.enter_context(no_more_descriptors())
                else:
                    patch.setattr(os, "readv", fail)
                assert await recall(cache, 3) is None
            await files.wait_written()
            assert len(stored(tmp_path)) == 1
            assert not any(cache.find("job", 1, [sequence(9, seed=3)]).is_kept)  # or it would be read again at once
            await keep(cache, 3, rows(3))
            assert await recall(cache, 3) == rows(3)
            state = cache.state()
            assert (state.corrupt, state.skipped, state.directory and state.directory.entries) == (0, 0, 1)
    assert len(stored(tmp_path)) == 1


async def test_files_are_for_their_user_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            await keep(cache, 3, rows(3))
    (file,) = stored(tmp_path)
    assert [path.stat().st_mode & 0o077 for path in (file, file.parent, tmp_path / "cache")] == [0, 0, 0]


# Crashes, full disks


def test_what_a_killed_server_had_not_finished_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "ab"
    folder.mkdir(parents=True)
    (folder / ("ab" * 32 + entry_file.UNFINISHED)).write_bytes(b"half")
    (folder / "notes.txt").write_text("of somebody else", encoding="utf-8")
    with opened(tmp_path / "cache", MIB) as files:
        assert files.state().entries == 0
    assert [file.name for file in stored(tmp_path)] == ["notes.txt"]


async def test_order_of_use_outlives_the_server(tmp_path: Path) -> None:
    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            for seed in range(3):
                await keep(cache, seed, rows(seed))
            names = [cache.find("job", 1, [sequence(9, seed=seed)]).keys[0].hex() for seed in range(3)]
    for age, name in enumerate(names):
        os.utime(tmp_path / "cache" / name[:2] / name, (1000 + age, 1000 + age))
    with opened(tmp_path / "cache", MIB) as files:
        async with cache_of(directory=files) as cache:
            assert await recall(cache, 0) == rows(0)
    with opened(tmp_path / "cache", 2 * ENTRY_BYTES):  # a smaller budget
        assert {file.name for file in stored(tmp_path)} == {names[0], names[2]}


async def test_a_full_disk_stops_the_writing_for_a_while_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, key: bytes, data: memoryview, digest: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    now = [0.0]
    files = RowDirectory(tmp_path, MIB, clock=lambda: now[0], rest_s=60)
    write = entry_file.write
    monkeypatch.setattr(directory_module.entry_file, "write", no_space)
    cache = RowCache(keys(), None, files)
    await keep(cache, 1, rows(1))
    await files.wait_written()
    assert "No space left" in cache.state().refusal
    monkeypatch.setattr(directory_module.entry_file, "write", write)
    await keep(cache, 2, rows(2))
    state = cache.state()
    assert (state.skipped, state.directory and state.directory.used_bytes) == (2, 0)
    now[0] = 61.0
    await keep(cache, 2, rows(2))
    await cache.close()
    assert cache.state().refusal == ""
    assert cache.state().directory == replace(cache.state().directory, entries=1)


async def test_what_waits_for_a_slow_disk_is_bounded_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), entry_file.write

    def write_later(path: Path, key: bytes, data: memoryview, digest: bytes) -> None:
        assert may_write.wait(30)
        write(path, key, data, digest)

    monkeypatch.setattr(directory_module.entry_file, "write", write_later)
    monkeypatch.setattr(directory_module, "_MAX_BACKLOG_BYTES", 2 * len(rows(1)))
    files = RowDirectory(tmp_path, MIB)
    cache = RowCache(keys(), None, files)
    for number in (1, 2, 3):
        await keep(cache, number, rows(number))
    assert (cache.state().skipped, files.state().entries) == (1, 2)
    may_write.set()
    await files.wait_written()
    for number in (3, 4):
        await keep(cache, number, rows(number))
    await cache.close()
    assert (cache.state().skipped, files.state().entries) == (1, 4)


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    path.mkdir()  # so that the last step, its replacement, fails
    kept = copy_of(memoryview(rows(1)))
    with pytest.raises(OSError, match="directory"):
        entry_file.write(path, b"k" * 32, kept.data.data, kept.digest)
    assert list(tmp_path.iterdir()) == [path]


# Refused before anything loads


def test_a_directory_belongs_to_one_server(tmp_path: Path) -> None:
    with opened(tmp_path, MIB), pytest.raises(ConfigError, match="another server has"), opened(tmp_path, MIB):
        pass


def test_a_budget_beyond_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache\.directory_mib: .* are more than"), opened(tmp_path, 2**60):
        pass


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"), opened(tmp_path / "file" / "cache", MIB):
        pass


def test_a_directory_and_its_budget_go_together() -> None:
    with pytest.raises(ValueError, match="go together"):
        CacheConfig(directory=Path("cache"))
    with pytest.raises(ValueError, match="go together"):
        CacheConfig(directory_mib=1)


def test_files_are_refused_for_weights_that_are_replaced() -> None:
    cache = {"directory": "cache", "directory_mib": 1}
    with pytest.raises(ValueError, match="outlives the weights"):
        TeacherConfig.model_validate({"engine": {"kind": "fake", "updatable": True}, "cache": cache})
