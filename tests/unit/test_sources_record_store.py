"""Records come back as they were written, and files that were damaged anywhere are noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdmesh_trainer.data.kept.record_store import Damaged, Records, RecordWriter, opened

NUMBERS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5)
FILES = ("tokens.bin", "index.bin", "meta.json")


def write(directory: Path, records: list[list[list[int]]], *, groups: int = 2) -> None:
    directory.mkdir()
    with RecordWriter(directory) as writer:
        for group in (records[n::groups] for n in range(groups)):
            arrays = [array for record in group for array in record]
            numbers = [number for array in arrays for number in array]
            writer.add(np.array([len(array) for array in arrays], np.int64), np.array(numbers, np.int32))
        writer.finish({"said": "so", "numbers": [1, 2.5]})


def read(records: Records) -> list[list[list[int]]]:
    return [[array.tolist() for array in records.arrays(number)] for number in range(len(records))]


@settings(max_examples=40)
@given(records=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=6))
def test_records_come_back_as_they_were_written(
    records: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("records") / "entry"
    if not any(array for record in records for array in record):
        records = [*records, [[1], [], []]]  # there are no sequences without tokens
    write(directory, records)
    found, said = opened(directory, 3)
    assert read(found) == records[0::2] + records[1::2]
    assert said == {"said": "so", "numbers": [1, 2.5]}


RECORDS = [[[1, 2, 3], [0]], [[7], [5, 6]], [[-1, 9], []]]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_byte_that_changed_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, name: str, where: float, flip: int
) -> None:
    directory = tmp_path_factory.mktemp("records") / "entry"
    write(directory, RECORDS)
    octets = bytearray((directory / name).read_bytes())
    octets[int(where * len(octets))] ^= flip
    (directory / name).write_bytes(octets)
    if name == "meta.json":
        # White space between its values may change and say the same.
        try:
            assert opened(directory, 2)[1] == {"said": "so", "numbers": [1, 2.5]}
        except Damaged:
            return
    else:
        with pytest.raises(Damaged, match=f"{name} has another digest"):
            opened(directory, 2)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_or_cut_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path / "cut", RECORDS)
    path = tmp_path / "cut" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match=name):
        opened(tmp_path / "cut", 2)
    path.unlink()
    with pytest.raises(Damaged, match=name):
        opened(tmp_path / "cut", 2)


def test_nothing_is_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "nothing", 2)
