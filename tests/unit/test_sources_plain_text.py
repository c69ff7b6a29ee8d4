"""Of a plain text every token is predicted once, whatever the length of sequences, beside chats or alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.chats.chat_rows import Chat, TeacherColumns, text_from_row
from kdmesh.errors import ConfigError, DataError
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import Addressed
from kdmesh_trainer.data.encoding.teacher_context import build_encoder
from kdmesh_trainer.data.encoding.turns import Reason, Unusable
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.prompts import PromptPolicy, load_prompts
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import DataConfig, TextFile
from tests.support.chat_tokenizers import chat_tokenizer

BASE = chat_tokenizer(None)  # no chat template, as base models have none; BOS comes before texts
TEXTS = ["Was it so? It was.", "yes", "日本語 🎉 " * 40]


def data_of(path: Path, texts: list[Any], **keys: Any) -> DataConfig:
    file = path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return DataConfig.model_validate({"train": {"format": "text", "path": str(file)}, **keys})


def sequences(data: DataConfig, **columns: Any) -> list[TokenSequence]:
    assert isinstance(data.train, TextFile)
    reader = open_dataset(data.train, teacher=TeacherColumns(**columns))
    return load_sequences("train", reader, build_encoder(BASE, data), data).sequences


def whole_ids(text: str) -> list[int]:
    return [*BASE(text)["input_ids"], BASE.eos_token_id]


def test_a_text_is_what_the_tokenizer_makes_of_it_and_its_end(tmp_path: Path) -> None:
    found = sequences(data_of(tmp_path, TEXTS))
    assert [s.token_ids.tolist() for s in found] == [whole_ids(text) for text in TEXTS]
    assert [s.labels.tolist() for s in found] == [whole_ids(text)[1:] for text in TEXTS]
    assert found[0].token_ids[0] == BASE.bos_token_id


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=120).filter(str.strip), st.integers(8, 24))
def test_every_token_but_the_first_is_predicted_once(text: str, max_tokens: int) -> None:
    data = DataConfig(train=TextFile(format="text", path=Path("a.jsonl")), max_tokens=max_tokens)
    [found] = build_encoder(BASE, data).encode([row(text)])
    assert isinstance(found, list)
    assert [label for s in found for label in s.labels.tolist()] == whole_ids(text)[1:]
    assert all(2 <= s.num_tokens <= max_tokens for s in found)
    # Only the last of them is shorter than it might be, and each goes on from the last token of the one before.
    assert all(s.num_tokens == max_tokens for s in found[:-1])
    assert all(a.token_ids[-1] == b.token_ids[0] for a, b in itertools.pairwise(found))


def row(text: str) -> Chat:
    return text_from_row({"text": text}, column="text", origin="here")


def test_an_end_that_is_there_already_is_not_said_twice(tmp_path: Path) -> None:
    [found] = sequences(data_of(tmp_path, [f"yes{BASE.eos_token}"]))
    assert found.token_ids.tolist() == whole_ids("yes")


def test_an_empty_text_has_nothing_to_predict(tmp_path: Path) -> None:
    bare = chat_tokenizer(None)
    bare.backend_tokenizer.post_processor = bare.backend_tokenizer.post_processor[0]
    data = data_of(tmp_path, ["", "yes"], unusable="drop")
    [nothing] = build_encoder(bare, data).encode([row("")])
    assert isinstance(nothing, Unusable)
    assert nothing.reason is Reason.NO_TEXT
    assert len(load_sequences("train", open_dataset(data.train), build_encoder(bare, data), data).sequences) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", " \n"])
def test_of_an_empty_text_the_end_behind_bos_is_not_learnt(tmp_path: Path, text: str) -> None:
    data = data_of(tmp_path, [text, "yes"], unusable="drop")
    assert [s.token_ids.tolist() for s in sequences(data)] == [whole_ids("yes")]
    with pytest.raises(DataError, match=r"texts\.jsonl:1: a text with nothing to predict"):
        sequences(data.model_copy(update={"unusable": "fail"}))


def test_texts_and_chats_are_trained_on_together_each_in_its_way(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    held_out = {"format": "chat", "path": str(tmp_path / "chats.jsonl")}
    data = data_of(tmp_path, TEXTS[:2], held_out=held_out)
    encoder = build_encoder(tokenizer, data)
    assert data.held_out is not None
    rows = [*open_dataset(data.train)(), *open_dataset(data.held_out)()]  # type: ignore[arg-type]
    mixed = [rows[0], rows[2], rows[1]]
    said = [tokenizer.decode(s.labels) for found in encoder.encode(mixed) if isinstance(found, list) for s in found]
    assert said == [f"{TEXTS[0]}<|eos|>", "Hello<|im_end|>", f"{TEXTS[1]}<|eos|>"]
    assert encoder.end_of_turn() == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_chats_need_a_template_and_texts_alone_need_none(tmp_path: Path) -> None:
    alone = data_of(tmp_path, TEXTS)
    assert build_encoder(BASE, alone).end_of_turn() is None
    with_chats = data_of(tmp_path, TEXTS, held_out={"format": "chat", "path": "a.jsonl"})
    with pytest.raises(ConfigError, match="has no chat template"):
        build_encoder(BASE, with_chats)


def test_on_policy_a_text_is_what_the_student_goes_on_from(tmp_path: Path) -> None:
    data = data_of(tmp_path, ["Was it so?", "It was. " * 30])
    policy = PromptPolicy(max_tokens=20, too_long="drop", unusable="fail")
    found = load_prompts("train", open_dataset(data.train), build_encoder(BASE, data), policy)  # type: ignore[arg-type]
    assert [prompt.token_ids.tolist() for prompt in found.prompts] == [BASE("Was it so?")["input_ids"]]
    assert found.report.dropped_too_long == 1


def test_each_row_may_name_its_teacher(tmp_path: Path) -> None:
    table = pa.table({"body": TEXTS[:2], "who": ["maths", "code"], "score": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    train = {"format": "text", "path": str(tmp_path / "a.parquet"), "column": "body"}
    data = DataConfig.model_validate({"train": train, "teacher_column": "who"})
    found = sequences(data, name="who", known_names=("code", "maths"))
    assert [s.teacher_name for s in found if isinstance(s, Addressed)] == ["maths", "code"]
    assert [s.token_ids.tolist() for s in found] == [whole_ids(text) for text in TEXTS[:2]]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (None, r"texts\.jsonl:1: no column 'text' with a text; columns found: text \(null\), id"),
        (3, r"texts\.jsonl:1: text must be a string, not int"),
        ("", r"texts\.jsonl:1: a text with nothing to predict"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(text: Any, refused: str, tmp_path: Path) -> None:
    data = data_of(tmp_path, [text])
    plain = chat_tokenizer(None)
    plain.backend_tokenizer.post_processor = plain.backend_tokenizer.post_processor[0]
    with pytest.raises(DataError, match=refused):
        load_sequences("train", open_dataset(data.train), build_encoder(plain, data), data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys", [{"teacher_context": {"kind": "system_prompt", "text": "x"}}, {"teacher_tokenizer": {"path": "models/t"}}]
)
def test_what_looks_for_turns_does_not_go_with_texts(keys: dict[str, Any]) -> None:
    texts = {"format": "text", "path": "a.jsonl"}
    with pytest.raises(ValueError, match=f"{next(iter(keys))} needs chats: it does not go with a dataset of format t"):
        DataConfig.model_validate({"train": {"format": "chat", "path": "b.jsonl"}, "held_out": texts, **keys})
