"""Token ids that lie in files are those that memory would hold, are made once, and are never half or wrong."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdmesh.chats.chat_rows import NO_COLUMNS, TeacherColumns
from kdmesh.errors import ConfigError, DataError
from kdmesh.tokens import digest
from kdmesh.types import Int32Array
from kdmesh_trainer.data.encoding.sides import Addressed, Aligned, InChunks, InContext, teacher_side
from kdmesh_trainer.data.files import pieces
from kdmesh_trainer.data.kept import token_cache
from kdmesh_trainer.data.kept.record_store import Records
from kdmesh_trainer.data.kept.stored import longest_of, measured, measured_prompts, sequence_facts
from kdmesh_trainer.data.prompts import PromptPolicy, load_prompts
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import DataConfig
from tests.support.chat_tokenizers import TEMPLATES, chat_tokenizer
from tests.support.other_tokenizers import save_sentence_piece
from tests.support.saved_datasets import save_to_disk
from tests.support.token_caches import SMALL_PIECES_BYTES, entries, files_of, make_cache, octets, plain

WHO = TeacherColumns(name="who", known_names=("maths", "code"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    chat_tokenizer("chatml").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other")
    save_sentence_piece(path)
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", SMALL_PIECES_BYTES)


def write_rows(path: Path, count: int = 60) -> Path:
    def message(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    rows = []
    for n in range(count):
        asked, answered = message("user", f"what is {n}?"), message("assistant", "the answer is " + "yes " * (n % 13))
        told = [message("user", f"Think of {n * n}. what is {n}?")]
        rows.append(
            {"messages": [asked, answered] * (1 + n % 2), "teacher_messages": told, "who": WHO.known_names[n % 2]}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(path: Path, **keys: Any) -> DataConfig:
    """Of a file of rows in `path`, which is made if need be, with a cache beside it."""
    file = path / "a.jsonl"
    if not file.exists():
        write_rows(file)
    tree = {
        "train": {"format": "chat", "path": str(file)},
        "max_tokens": 40,
        "token_cache": {"directory": path / "cache"},
    }
    return DataConfig.model_validate({**tree, **keys})


@pytest.mark.parametrize(
    ("kind", "keys", "columns", "takes_chunks"),
    [
        (None, {}, NO_COLUMNS, False),
        (Addressed, {"teacher_column": "who"}, WHO, False),
        (InContext, {"teacher_context": {"kind": "system_prompt", "text": "Be brief."}}, NO_COLUMNS, False),
        (
            InContext,
            {"teacher_context": {"kind": "messages"}, "teacher_column": "who"},
            TeacherColumns(messages="teacher_messages", name="who", known_names=WHO.known_names),
            False,
        ),
        (Aligned, {"teacher_tokenizer": {}}, NO_COLUMNS, False),
        (InChunks, {"teacher_tokenizer": {}}, NO_COLUMNS, True),
    ],
    ids=["plain", "named", "in context", "named in context", "aligned", "in chunks"],
)
def test_stored_sequences_are_those_of_memory(
    tmp_path: Path,
    student: Path,
    other: Path,
    kind: type | None,
    keys: dict[str, Any],
    columns: TeacherColumns,
    takes_chunks: bool,
) -> None:
    if "teacher_tokenizer" in keys:
        keys = {"teacher_tokenizer": {"path": str(other)}}
    data = data_of(tmp_path, **keys)
    cache, encoder = make_cache(student, data, takes_chunks=takes_chunks)
    files = files_of(data, columns)
    expected = load_sequences("train", files, encoder, data).sequences
    for found in (cache.sequences("train", files), cache.sequences("train", files)):  # made, and found
        assert [plain(s) for s in found] == [plain(s) for s in expected]
        assert sequence_facts(found) == measured(expected)
        assert found.facts.digest == digest(expected).hex()
        assert longest_of(found) == longest_of(expected)
    assert kind is None or isinstance(found[0], kind)
    assert {type(s) for s in teacher_side(found)} == {type(s) for s in teacher_side(expected)}
    assert [plain(s) for s in found[3:9:2]] == [plain(s) for s in expected[3:9:2]]
    assert plain(found[-1]) == plain(expected[-1])


def test_sequences_are_read_once_to_know_what_there_is_of_them(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    arrays = Records.arrays

    def watched(records: Records, number: int) -> list[Int32Array]:
        read.append(number)
        return arrays(records, number)

    monkeypatch.setattr(Records, "arrays", watched)
    data = data_of(tmp_path)
    cache, _ = make_cache(student, data)
    assert len(cache.sequences("train", files_of(data))) == 60
    assert read == list(range(60))


@pytest.mark.parametrize("columns", [NO_COLUMNS, WHO])
def test_stored_sequences_have_their_weights(tmp_path: Path, student: Path, columns: TeacherColumns) -> None:
    file = write_rows(tmp_path / "a.jsonl")
    rows = [{**json.loads(line), "w": n % 4 / 3} for n, line in enumerate(file.read_text().splitlines())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"format": "chat", "path": str(file)}
    plain_data, data = data_of(tmp_path), data_of(tmp_path, train={**train, "weight_column": "w"})
    cache, encoder = make_cache(student, data)
    expected = load_sequences("train", files_of(data, columns), encoder, data)
    assert (expected.report.rows, expected.report.of_weight_0) == (60, 15)
    assert {s.weight for s in expected.sequences} == {1 / 3, 2 / 3, 1.0}
    for found in (cache.sequences("train", files_of(data, columns)) for _ in range(2)):
        assert [(s.weight, *plain(s)) for s in found] == [(s.weight, *plain(s)) for s in expected.sequences]
        assert sequence_facts(found) == measured(expected.sequences)
        assert found.facts.weights
    unweighted, _ = make_cache(student, plain_data)
    assert unweighted.sequences("train", files_of(plain_data, columns)).facts.weights == ""
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize("form", ["csv", "arrow"])
def test_tables_are_stored_as_memory_has_them_however_many_processes_read_them(
    tmp_path: Path, student: Path, form: str
) -> None:
    rows = [{"prompt": f"what is {n}?", "completion": "the answer\nis " + "yes " * (1 + n % 13)} for n in range(40)]
    if form == "csv":
        with (tmp_path / "a.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
        path = tmp_path / "a.csv"
    else:
        path = save_to_disk(tmp_path / "saved", [rows[:15], rows[15:]], batch_rows=4)
    cache = {"directory": tmp_path / "cache", "workers": 2}
    data = data_of(tmp_path, train={"format": "chat", "path": str(path)}, token_cache=cache)
    stored, encoder = make_cache(student, data)
    expected = load_sequences("train", files_of(data), encoder, data).sequences
    assert len(expected) == 40
    assert [plain(s) for s in stored.sequences("train", files_of(data))] == [plain(s) for s in expected]


@pytest.mark.parametrize("context", [None, {"kind": "system_prompt", "text": "Be brief."}])
@pytest.mark.parametrize("columns", [NO_COLUMNS, WHO])
def test_stored_prompts_are_those_of_memory(
    tmp_path: Path, student: Path, context: dict[str, str] | None, columns: TeacherColumns
) -> None:
    data = data_of(tmp_path, teacher_context=context)
    cache, encoder = make_cache(student, data)
    policy = PromptPolicy(max_tokens=30, too_long="drop", unusable="drop")
    expected = load_prompts("train", files_of(data, columns), encoder, policy).prompts
    found = cache.prompts("train", files_of(data, columns), policy)
    assert len(found) == len(expected) > 20
    for one, two in zip(found, expected, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist()
        assert (one.teacher_ids is None) == (two.teacher_ids is None) == (context is None)
        if one.teacher_ids is not None and two.teacher_ids is not None:
            assert one.teacher_ids.tolist() == two.teacher_ids.tolist()
        assert one.teacher_name == two.teacher_name
    assert found.facts == measured_prompts(expected)


def test_what_is_left_out_is_counted_alike_in_one_piece_and_in_many(
    tmp_path: Path, student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of(tmp_path, unusable="drop", max_tokens=20)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    cache, encoder = make_cache(student, data)
    files = files_of(data)
    with caplog.at_level(logging.INFO):
        load_sequences("train", files, encoder, data)
        cache.sequences("train", files)
        cache.sequences("train", files)
    reports = [
        {key: getattr(record, key) for key in ("rows", "sequences", "truncated", "unusable", "tokens", "loss_tokens")}
        for record in caplog.records
        if record.getMessage() == "dataset read"
    ]
    assert reports == [reports[0]] * 3
    assert (reports[0]["rows"], reports[0]["unusable"]) == (61, {"no assistant turn": 1})
    assert reports[0]["truncated"] > 0


def test_what_was_made_is_not_made_again(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(tmp_path)
    made = make_cache(student, data)[0].sequences("train", files_of(data))
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "a.jsonl", moved / "b.jsonl")  # another name, another time, the same rows
    tree = data.model_dump(mode="json")

    def refuse(*args: object, **kwargs: object) -> Iterator[None]:
        raise AssertionError("it was there")

    monkeypatch.setattr(token_cache, "tokenised", refuse)
    tree["train"]["path"] = str(moved / "b.jsonl")
    elsewhere = DataConfig.model_validate(tree)
    assert make_cache(student, elsewhere)[0].sequences("train", files_of(elsewhere)).facts == made.facts
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"max_tokens": 41},
        {"too_long": "drop"},
        {"unusable": "drop"},
        {"trained_turns": "last"},
        {"teacher_context": {"kind": "system_prompt", "text": "Be brief."}},
        {"chat_template": "other.jinja"},
        {"train": {"format": "chat", "path": "a.jsonl", "completion_column": "who"}},
        {"chat_template_settings": {"role": "x"}},
        {"train": {"format": "chat", "path": "a.jsonl", "column": "teacher_messages"}, "unusable": "drop"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_other_settings_make_other_tokens(
    tmp_path: Path, student: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jinja").write_text(TEMPLATES["phi"])
    data = data_of(tmp_path)
    make_cache(student, data)[0].sequences("train", files_of(data))
    changed = data_of(tmp_path, **keys)
    if "unusable" in keys and "train" in keys:
        with pytest.raises(DataError, match="none of 60 rows"):  # the column has no answer in it
            make_cache(student, changed)[0].sequences("train", files_of(changed))
        assert len(entries(tmp_path / "cache")) == 1
        return
    make_cache(student, changed)[0].sequences("train", files_of(changed))
    assert len(entries(tmp_path / "cache")) == 2


def test_another_tokenizer_makes_other_tokens(tmp_path: Path, student: Path) -> None:
    data = data_of(tmp_path)
    make_cache(student, data)[0].sequences("train", files_of(data))
    changed = tmp_path / "changed"
    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_tokens(["answer"])
    tokenizer.save_pretrained(changed)
    make_cache(changed, data)[0].sequences("train", files_of(data))
    assert len(entries(tmp_path / "cache")) == 2


def test_a_file_that_was_changed_is_read_again_whatever_its_times_say(tmp_path: Path, student: Path) -> None:
    data = data_of(tmp_path)
    file = tmp_path / "a.jsonl"
    first = make_cache(student, data)[0].sequences("train", files_of(data))
    stat = file.stat()
    file.write_text(file.read_text().replace("what is 7?", "what is 8?"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert make_cache(student, data)[0].sequences("train", files_of(data)).facts.digest != first.facts.digest


@pytest.mark.parametrize("name", ["tokens.bin", "index.bin", "meta.json"])
def test_what_was_damaged_is_noticed_and_made_again(
    tmp_path: Path, student: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    data = data_of(tmp_path)
    held = make_cache(student, data)[0].sequences("train", files_of(data))
    expected = [plain(s) for s in held]
    [entry] = entries(tmp_path / "cache")
    whole = octets(entry)
    spoilt = bytearray(whole[name])
    spoilt[len(spoilt) // 2] ^= 0x41
    (entry / name).write_bytes(spoilt)
    found = make_cache(student, data)[0].sequences("train", files_of(data))
    assert [plain(s) for s in found] == expected
    assert octets(entry) == whole
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == "token ids are damaged, so they are made again"
    assert name in warning.why  # type: ignore[attr-defined]
    assert entries(tmp_path / "cache") == [entry]


@pytest.mark.parametrize("name", ["tokens.bin", "index.bin", "meta.json"])
def test_what_cannot_be_read_now_is_not_made_again(tmp_path: Path, student: Path, name: str) -> None:
    data = data_of(tmp_path)
    make_cache(student, data)[0].sequences("train", files_of(data))
    [entry] = entries(tmp_path / "cache")
    (entry / name).rename(tmp_path / name)
    (entry / name).symlink_to(name)  # whoever opens it gets an error, root too
    with pytest.raises(DataError, match=rf"directory: .*cache cannot be used: .*{name}"):
        make_cache(student, data)[0].sequences("train", files_of(data))
    (entry / name).unlink()
    (tmp_path / name).rename(entry / name)
    inode = entry.stat().st_ino
    assert len(make_cache(student, data)[0].sequences("train", files_of(data)))
    assert entries(tmp_path / "cache") == [entry]
    assert entry.stat().st_ino == inode


def test_a_bad_row_is_named_and_nothing_is_left(tmp_path: Path, student: Path) -> None:
    data = data_of(tmp_path)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"messages": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:61: messages must be a list of messages, not int"):
        make_cache(student, data)[0].sequences("train", files_of(data))
    assert entries(tmp_path / "cache") == []


def test_an_empty_file_is_refused(tmp_path: Path, student: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    data = data_of(tmp_path)
    with pytest.raises(DataError, match=r"dataset .*a\.jsonl is empty"):
        make_cache(student, data)[0].sequences("train", files_of(data))


def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tmp_path)
    tokenised = token_cache.tokenised

    def changing(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from tokenised(*args, **kwargs)
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write("\n")

    monkeypatch.setattr(token_cache, "tokenised", changing)
    with pytest.raises(DataError, match="has changed while it was read"):
        make_cache(student, data)[0].sequences("train", files_of(data))
    assert entries(tmp_path / "cache") == []


def test_a_full_disk_ends_with_a_sentence(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.RecordWriter, "add", full)
    data = data_of(tmp_path)
    with pytest.raises(DataError, match=r"data\.token_cache\.directory: .*cache cannot be used: .*No space left"):
        make_cache(student, data)[0].sequences("train", files_of(data))
    assert entries(tmp_path / "cache") == []


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, student: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    data = data_of(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.token_cache\.directory: .* cannot be written"):
        make_cache(student, data)[0].claim()


def test_what_a_killed_process_began_is_removed_when_something_is_made(tmp_path: Path, student: Path) -> None:
    left = tmp_path / "cache" / "0123.writing"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"half")
    data = data_of(tmp_path)
    make_cache(student, data)[0].sequences("train", files_of(data))
    assert [path.suffix for path in entries(tmp_path / "cache")] == [""]


def test_one_that_has_claimed_need_not_wait_for_itself(tmp_path: Path, student: Path) -> None:
    data = data_of(tmp_path)
    first, second = make_cache(student, data)[0], make_cache(student, data)[0]
    first.claim()
    second.claim()  # is not given it, and does not wait
    made = first.sequences("train", files_of(data))
    assert second.sequences("train", files_of(data)).facts == made.facts  # found
    first.release()
    second.claim()
    second.release()


def test_a_directory_and_parquet_are_kept_too(tmp_path: Path, student: Path) -> None:
    rows = [json.loads(line) for line in write_rows(tmp_path / "x.jsonl").read_text().splitlines()]
    files = tmp_path / "files"
    files.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), files / "b.parquet", row_group_size=7)
    shutil.copy(tmp_path / "x.jsonl", files / "a.jsonl")
    data = data_of(tmp_path, train={"format": "chat", "path": str(files)})
    cache, encoder = make_cache(student, data)
    expected = load_sequences("train", files_of(data), encoder, data).sequences
    found = cache.sequences("train", files_of(data))
    assert [plain(s) for s in found] == [plain(s) for s in expected]
    assert plain(found[0]) == plain(found[len(found) // 2])
