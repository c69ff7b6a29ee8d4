"""Rows of the training data that are held out: always the same ones, and never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdmesh import config
from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import ConfigError, DataError
from kdmesh.preflight import check
from kdmesh.types import Image, TokenSequence
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.recipe import Encoder
from kdmesh_trainer.data.files import pieces
from kdmesh_trainer.data.files.held_out_rows import is_held_out
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.prompts import PromptPolicy
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.data.training_data import TrainingData
from kdmesh_trainer.sections.data_config import DataConfig
from tests.support.chat_tokenizers import chat_tokenizer
from tests.support.token_caches import SMALL_PIECES_BYTES, make_cache

EXAMPLE = Path(__file__).parents[2] / "examples" / "train.yaml"
TOKENIZER = chat_tokenizer("chatml")
POLICY = PromptPolicy(max_tokens=30, too_long="drop", unusable="drop")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    TOKENIZER.save_pretrained(path)
    return path


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"row {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(first, first + count)
    ]


def chat(text: str, *, origin: str = "a:1", images: tuple[Image, ...] = ()) -> Chat:
    user = Message(role="user", content=text, parts=(text, *images) if images else ())
    return Chat(messages=(user, Message(role="assistant", content="yes")), origin=origin)


def file_of(path: Path, told: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return {"format": "chat", "path": str(path)}


class Read:
    """What a job makes of its data: numbers of rows."""

    def __init__(
        self,
        student: Path,
        train: dict[str, Any],
        held_out: float | None,
        *,
        cache: Path | None = None,
        workers: int = 0,
    ) -> None:
        """`cache`: where token ids lie; None: in memory."""
        told = None if cache is None else {"directory": str(cache), "workers": workers}
        self._config = DataConfig.model_validate(
            {"max_tokens": 64, "train": train, "held_out": held_out, "token_cache": told}
        )
        self._encoder: Encoder = ChatEncoder(TOKENIZER)
        found = None
        if cache is not None:
            found, self._encoder = make_cache(student, self._config)
        self._training = TrainingData(self._config, self._encoder, found, open_dataset)

    def trained(self) -> list[int]:
        return sorted(map(_number, self._training.sequences()))

    def prompted(self) -> list[int]:
        return sorted(_numbered(TOKENIZER.decode(prompt.token_ids)) for prompt in self._training.prompts(POLICY))

    def judged(self, most: int | None = None) -> list[int]:
        (reader,) = self._training.held_out().values()
        found = load_sequences("held_out", reader, self._encoder, self._config, max_sequences=most)
        return list(map(_number, found.sequences))


def _number(sequence: TokenSequence) -> int:
    return _numbered(TOKENIZER.decode(sequence.token_ids))


def _numbered(text: str) -> int:
    return int(text.split("row ")[1].split("<")[0])


def test_the_choice_is_the_same_for_ever() -> None:
    assert [n for n in range(60) if is_held_out(chat(f"row {n}"), 0.1)] == [14, 30, 45, 52, 59]


def test_a_share_takes_about_so_many_and_a_smaller_one_takes_some_of_these() -> None:
    chats = [chat(f"row {n}") for n in range(4000)]
    held_out = [{n for n, each in enumerate(chats) if is_held_out(each, share)} for share in (0.01, 0.1, 0.5)]
    assert [pytest.approx(len(each) / 4000, abs=0.02) for each in held_out] == [0.01, 0.1, 0.5]
    assert held_out[0] < held_out[1] < held_out[2]


def test_only_what_a_row_says_decides() -> None:
    for n in range(200):
        assert is_held_out(chat(f"row {n}"), 0.5) == is_held_out(chat(f"row {n}", origin="b:7"), 0.5)
    images = [
        Image(digest=bytes([n]) * 16, data=b"", size_bytes=0, width=1, height=1) for n in range(64)
    ]  # the same text about each
    assert {is_held_out(chat("what is it?", images=(image,)), 0.5) for image in images} == {True, False}


@pytest.mark.parametrize("workers", [None, 0, 1], ids=["in memory", "in files", "in files by a worker"])
def test_every_row_is_trained_on_or_judged_and_never_both(
    student: Path, tmp_path: Path, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", SMALL_PIECES_BYTES)
    train = file_of(tmp_path / "a.jsonl", rows(0, 200))
    read = Read(student, train, 0.2, cache=None if workers is None else tmp_path / "cache", workers=workers or 0)
    assert sorted([*read.trained(), *read.judged()]) == list(range(200))
    assert read.prompted() == read.trained()
    assert 20 < len(read.judged()) < 60
    assert read.judged(most=7) == read.judged()[:7]


def test_files_made_without_a_share_or_with_another_are_not_taken_for_those(student: Path, tmp_path: Path) -> None:
    train = file_of(tmp_path / "a.jsonl", rows(0, 100))
    trained = {share: Read(student, train, share, cache=tmp_path / "cache").trained() for share in (None, 0.1, 0.3)}
    assert trained[None] == list(range(100))
    assert len(trained[None]) > len(trained[0.1]) > len(trained[0.3])


def test_rows_do_not_change_sides_when_others_come_or_their_order_does(student: Path, tmp_path: Path) -> None:
    few = file_of(tmp_path / "few.jsonl", rows(0, 100))
    many = file_of(tmp_path / "many.jsonl", [*reversed(rows(100, 50)), *reversed(rows(0, 100))])
    judged = [set(Read(student, train, 0.3).judged()) for train in (few, many)]
    assert judged[0] == {n for n in judged[1] if n < 100}


def test_rows_of_a_blend_are_held_out_of_each_dataset_in_turn(student: Path, tmp_path: Path) -> None:
    told = {"large": (0, 150), "small": (1000, 50)}
    datasets = {name: file_of(tmp_path / f"{name}.jsonl", rows(*r)) | {"weight": 1} for name, r in told.items()}
    read = Read(student, {"format": "blend", "datasets": datasets}, 0.2)
    judged = read.judged()
    assert sorted([*read.trained(), *judged]) == [*range(150), *range(1000, 1050)]
    assert [n >= 1000 for n in judged[:6]] == [False, True] * 3


@pytest.mark.parametrize("in_files", [True, False])
def test_a_share_that_leaves_nothing_on_one_side_is_refused(student: Path, tmp_path: Path, in_files: bool) -> None:
    train, cache = file_of(tmp_path / "a.jsonl", rows(0, 5)), tmp_path / "cache" if in_files else None
    with pytest.raises(DataError, match=r"data.held_out \(0.0001\) takes none of the rows of data.train"):
        Read(student, train, 0.0001, cache=cache).judged()
    with pytest.raises(DataError, match=r"dataset train: data.held_out \(0.9999\) takes all of its rows"):
        Read(student, train, 0.9999, cache=cache).trained()
    with pytest.raises(DataError, match=r"dataset train: data.held_out \(0.9999\) takes all of its rows"):
        Read(student, train, 0.9999, cache=cache).prompted()
    empty = file_of(tmp_path / "b.jsonl", [])
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"dataset .*b\.jsonl is empty"):
        Read(student, empty, 0.5, cache=cache).trained()


def test_a_readers_own_rows_are_held_out_too(student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "numbered_rows.py").write_text(
        "def chats():\n"
        "    for n in range(100):\n"
        "        yield [{'role': 'user', 'content': f'row {n}'}, {'role': 'assistant', 'content': 'yes'}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    in_file = file_of(tmp_path / "a.jsonl", rows(0, 100))
    own = Read(student, {"format": "custom", "target": "numbered_rows:chats"}, 0.2)
    assert own.trained() == Read(student, in_file, 0.2).trained()
    assert own.judged() == Read(student, in_file, 0.2).judged()


def test_a_missing_file_of_several_is_named_by_its_dataset() -> None:
    several = "{format: several, datasets: {code: {format: chat, path: nowhere.jsonl}}}"
    lines = check.missing(check.load_any(EXAMPLE, [f"data.held_out={several}"]))
    assert "data.held_out.datasets.code.path: there is no file or directory nowhere.jsonl" in lines
    assert not any("held_out" in line for line in check.missing(check.load_any(EXAMPLE, ["data.held_out=0.1"])))


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        ("0", "data.held_out: Input should be greater than 0"),
        ("500", "data.held_out: Input should be less than 1 .got 500"),
        ("x.jsonl", "data.held_out"),
        ("{format: several, datasets: {}}", "data.held_out.*at least 1 item"),
        ("{format: char, path: x}", "data.held_out.*'chat', 'text', 'custom', 'several'"),
    ],
)
def test_what_is_neither_a_share_nor_a_dataset_is_refused(held_out: str, words: str) -> None:
    assert config.load(TrainerConfig, EXAMPLE, ["data.held_out=0.02"]).data.held_out_share == 0.02
    with pytest.raises(ConfigError, match=words):
        config.load(TrainerConfig, EXAMPLE, [f"data.held_out={held_out}"])
