"""Parquet and Arrow files may hold what Python, or a row, cannot: it is refused with its place, or left unread."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdmesh.errors import DataError
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile
from tests.support.saved_datasets import write_stream

_OFFSETS = b"\0\0\0\0\1\0\0\0\2\0\0\0"
NO_UTF8 = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(_OFFSETS), pa.py_buffer(b"a\xff")])
AFTER_9999 = pa.array([0, 10_000_000], pa.date32())
SHORTER_THAN_A_MICROSECOND = pa.array([0, 1], pa.timestamp("ns"))


def _arrow_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _stream(path: Path, table: pa.Table) -> None:
    write_stream(path, table, batch_rows=2)


def _parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


Write = Callable[[Path, pa.Table], None]
every_kind = pytest.mark.parametrize(
    ("write", "name"), [(_parquet, "a.parquet"), (_arrow_file, "a.arrow"), (_stream, "a.arrow")]
)


@every_kind
def test_a_text_that_is_not_utf_8_is_refused_with_its_row_and_column(tmp_path: Path, write: Write, name: str) -> None:
    write(tmp_path / name, pa.table({"prompt": NO_UTF8, "completion": ["x", "y"]}))
    words = {"a.parquet": "row 2: prompt cannot be read: 'utf-8'", "a.arrow": "rows 1 to 2 are damaged, or no UTF-8: "}
    with pytest.raises(DataError, match=f"{name}: {words[name]}"):
        list(open_dataset(ChatFile(path=tmp_path / name))())


@every_kind
@pytest.mark.parametrize("beside", [NO_UTF8, AFTER_9999, SHORTER_THAN_A_MICROSECOND])
def test_a_value_that_python_cannot_hold_is_no_matter_where_nobody_reads_it(
    tmp_path: Path, write: Write, name: str, beside: pa.Array
) -> None:
    write(tmp_path / name, pa.table({"made": beside, "q": ["a", "b"], "a": ["x", "y"]}))
    config = ChatFile(path=tmp_path / name, prompt_column="q", completion_column="a")
    assert [chat.messages[0].content for chat in open_dataset(config)()] == ["a", "b"]
    whole = open_dataset(config, keeps_rows=True)
    with pytest.raises(DataError, match=rf"{name}: row(s 1 to 2 are damaged, or no UTF-8| 2: made cannot be read): "):
        list(whole())


@every_kind
def test_two_columns_of_one_name_are_refused(tmp_path: Path, write: Write, name: str) -> None:
    columns = [pa.array(texts) for texts in (["a"], ["b"], ["x"])]
    write(tmp_path / name, pa.table(columns, names=["prompt", "prompt", "completion"]))
    with pytest.raises(DataError, match=rf"{name} has several columns 'prompt'; a row has each once"):
        list(open_dataset(ChatFile(path=tmp_path / name))())


@every_kind
def test_a_misspelt_column_is_told_with_all_that_there_are(tmp_path: Path, write: Write, name: str) -> None:
    write(tmp_path / name, pa.table({"q": ["a"], "answer": ["x"]}))
    config = ChatFile(path=tmp_path / name, prompt_column="q", completion_column="a")
    with pytest.raises(DataError, match=rf"no row has a column 'a', .*{name}: row 1: q, answer"):
        list(open_dataset(config)())


@every_kind
def test_no_damage_of_a_file_ends_the_process(tmp_path: Path, write: Write, name: str) -> None:
    """In a process of its own: pyarrow follows damaged places, to anywhere."""
    rows = [{"prompt": "q" * number, "completion": "a" * number} for number in range(1, 20)]
    write(tmp_path / name, pa.Table.from_pylist(rows))
    done = subprocess.run(
        [sys.executable, "-c", _DAMAGE, str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


_DAMAGE = """
import contextlib, pathlib, random, resource, sys
from kdmesh.errors import DataError
from kdmesh_trainer.data.files.pieces import size_of
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
path, words = pathlib.Path(sys.argv[1]), random.Random(1)
whole = path.read_bytes()
for _ in range(300):
    damaged = bytearray(whole)
    for _ in range(words.randint(1, 4)):
        damaged[words.randrange(len(whole))] = words.randrange(256)
    path.unlink()
    path.write_bytes(damaged)
    with contextlib.suppress(DataError):
        size_of(path)
        list(open_dataset(ChatFile(path=path))())
"""
