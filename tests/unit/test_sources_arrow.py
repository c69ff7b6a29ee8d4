"""Arrow files give the rows of the same table, as a stream or with an index, alone or saved by `datasets`."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from kdmesh.errors import DataError
from kdmesh_trainer.data.files import arrow_files
from kdmesh_trainer.data.files.pieces import pieces_of, rows_of, size_of
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile
from tests.support.saved_datasets import save_to_disk, write_stream

ROWS = [
    {
        "messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "It is " * n}],
        "id": n,
    }
    for n in range(1, 26)
]


def contents(path: Path) -> list[str]:
    return [chat.messages[0].content for chat in open_dataset(ChatFile(path=path))()]


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("least_bytes", [1, 2**20])
def test_rows_and_their_places_are_those_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool, least_bytes: int
) -> None:
    monkeypatch.setattr(arrow_files, "PIECE_BYTES", least_bytes)
    path, table = tmp_path / "a.arrow", pa.Table.from_pylist(ROWS)
    if is_stream:
        write_stream(path, table, batch_rows=4)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    parts = list(pieces_of(path))
    assert len(parts) == (1 if is_stream and least_bytes > 1 else 7)
    assert sum(piece.size_bytes for piece in parts) == size_of(path) > 0
    found = [row for piece in parts for row in rows_of(piece, list)]
    assert found == [(f"{path}: row {n}", row) for n, row in enumerate(ROWS, start=1)]
    assert list(rows_of(parts[-1], lambda names: ["id"]))[-1] == (f"{path}: row 25", {"id": 25})


def test_a_saved_dataset_is_read_in_its_own_order_and_nothing_beside_it(tmp_path: Path) -> None:
    saved = save_to_disk(tmp_path / "saved", [ROWS[:10], ROWS[10:]], batch_rows=3)
    assert contents(saved) == [row["messages"][0]["content"] for row in ROWS]  # type: ignore[index]
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"].reverse()
    (saved / "state.json").write_text(json.dumps(state))
    assert contents(saved)[0] == "What is 11?"
    assert contents(saved / "data-00000-of-00002.arrow") == [f"What is {n}?" for n in range(1, 11)]


def test_a_directory_of_which_it_is_not_clear_what_is_meant_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "splits" / split, [ROWS])
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        DataError, match=r"splits holds splits of a dataset; name the directory of one of them: test, tr"
    ):
        open_dataset(ChatFile(path=tmp_path / "splits"))
    cache = save_to_disk(tmp_path / "cache", [ROWS])
    (cache / "state.json").unlink()
    with pytest.raises(DataError, match=r"dataset_info.json without state.json: it is a cache; name one of its"):
        open_dataset(ChatFile(path=cache))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json does not name the files of a dataset: JSONDecodeError"),
        ("{}", r"state\.json does not name the files of a dataset: KeyError"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"state\.json names gone\.arrow, and there is no such file"),
        ('{"_data_files": [], "_indices_data_files": [{}]}', "holds a choice of rows apart from its files"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, state: str, message: str) -> None:
    saved = save_to_disk(tmp_path / "saved", [ROWS])
    (saved / "state.json").write_text(state)
    with pytest.raises(DataError, match=message):
        open_dataset(ChatFile(path=saved))


def test_what_is_no_arrow_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    for octets in (b"", b"junk and more junk", b"ARROW1 or not, for it goes on"):
        path.write_bytes(octets)
        with pytest.raises(DataError, match=r"a\.arrow is not an Arrow file"):
            contents(path)
    write_stream(path, pa.Table.from_pylist(ROWS), batch_rows=4)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.arrow(: | is not an Arrow file: )Expected to"):
        contents(path)


def test_a_dictionary_in_a_stream_is_refused_by_its_column(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["x", "y"]).dictionary_encode()})
    with pytest.raises(DataError, match=r"a\.arrow: column text is dictionary-encoded; write it as plain values"):
        contents(write_stream(tmp_path / "a.arrow", table))
