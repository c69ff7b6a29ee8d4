"""Files fall into pieces that say the same rows, with the same origins, as the file as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdmesh.errors import DataError
from kdmesh_trainer.data.files import piece, pieces
from kdmesh_trainer.data.files.pieces import find_files, pieces_of, rows_of, size_of


def rows(path: Path) -> list[tuple[str, object]]:
    return [row for piece in pieces_of(path) for row in rows_of(piece, list)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16)


# The fixture is the same for every example.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    texts=st.lists(st.text(max_size=12), max_size=12),
    ends=st.sampled_from(["\n", "\r\n"]),
    blank=st.sampled_from(["", " ", "\n\n"]),
    mark=st.booleans(),
    is_ended=st.booleans(),
)
def test_lines_are_the_same_in_pieces_of_any_size(
    tmp_path: Path, small: None, texts: list[str], ends: str, blank: str, mark: bool, is_ended: bool
) -> None:
    path = tmp_path / "a.jsonl"
    text = (ends + blank).join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes(("\ufeff" * mark + text + ends * is_ended).encode())
    numbered = enumerate(path.read_text("utf-8-sig").split("\n"), start=1)
    expected = [(f"{path}:{number}", json.loads(line)) for number, line in numbered if line.strip()]
    assert rows(path) == expected
    parts = list(pieces_of(path))
    assert sum(piece.size_bytes for piece in parts) == size_of(path) == path.stat().st_size


def test_a_piece_can_be_read_without_those_before_it(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"number": {number}}}\n' for number in range(30)))
    *before, last = pieces_of(path)
    assert len(before) > 5
    assert list(rows_of(last, list))[-1] == (f"{path}:30", {"number": 29})


def test_parquet_falls_into_its_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"number": list(range(25)), "other": ["x"] * 25})
    pq.write_table(table, path, row_group_size=10)
    parts = list(pieces_of(path))
    assert [(piece.begin, piece.first) for piece in parts] == [(0, 1), (1, 11), (2, 21)]
    assert sum(piece.size_bytes for piece in parts) == size_of(path)
    found = [row for piece in parts for row in rows_of(piece, lambda names: ["number"])]
    assert found == [(f"{path}: row {number + 1}", {"number": number}) for number in range(25)]


@pytest.mark.parametrize("num_rows", [2_500, 7])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_large_group_of_rows_falls_into_parts_of_which_each_can_be_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, num_rows: int
) -> None:
    path = tmp_path / f"a.{kind}"
    table = pa.table({"number": list(range(num_rows)), "other": ["x"] * num_rows})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write(table.combine_chunks().to_batches()[0])
    [whole] = pieces_of(path)
    monkeypatch.setattr(piece, "_PART_BYTES", 1)
    parts = list(pieces_of(path))
    assert len(parts) == min(num_rows, piece._MOST_PARTS)
    assert sum(part.size_bytes for part in parts) == size_of(path) == whole.size_bytes
    alone = [list(rows_of(part, lambda names: ["number"])) for part in reversed(parts)]
    found = [row for part in reversed(alone) for row in part]
    assert found == [(f"{path}: row {number + 1}", {"number": number}) for number in range(num_rows)]
    assert {len(part) for part in alone} <= {num_rows // len(parts), num_rows // len(parts) + 1}


def test_an_array_is_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(' [{"a": 1}, {"a": 2}]')
    [piece] = pieces_of(path)
    assert (piece.kind, [row for _, row in rows_of(piece, list)]) == ("array", [{"a": 1}, {"a": 2}])


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 3)
    [piece] = pieces_of(path)
    path.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="has changed while it was read"):
        list(rows_of(piece, list))


def test_bytes_that_are_no_text_are_named_by_their_place_in_the_file(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 10 + b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl is not UTF-8: invalid start byte at byte 97"):
        rows(path)


def test_files_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "c.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in find_files(tmp_path)] == ["a.parquet", "b.jsonl"]
