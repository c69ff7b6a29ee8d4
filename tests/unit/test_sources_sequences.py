"""Datasets become sequences under the policies, and everything left out is counted."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import ConfigError, DataError
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.sides import teacher_side
from kdmesh_trainer.data.encoding.teacher_context import build_encoder
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer, vocabulary_size
from kdmesh_trainer.data.encoding.turns import Unusable
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.sequences import Dataset, load_sequences
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig
from tests.support.chat_tokenizers import TEMPLATES, chat_tokenizer

TOKENIZER = chat_tokenizer("chatml")


def row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load(path: Path, rows: list[dict[str, Any]], **policy: Any) -> Dataset:
    file = path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    most = policy.pop("max_sequences", None)
    data = DataConfig(train=ChatFile(path=file), **policy)
    encoder = ChatEncoder(TOKENIZER)
    return load_sequences("train", open_dataset(data.train), encoder, data, max_sequences=most)


LONG = row("Was it so?", "It was so. " * 30)
LONG_PROMPT = row("Was it so? " * 30, "yes")
SHORT = row("Was it so?", "It was.")


def test_sequences_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    dataset = load(tmp_path, [row("a", str(number)) for number in range(600)])
    said = [TOKENIZER.decode(s.labels) for s in dataset.sequences]
    assert said == [f"{number}<|im_end|>" for number in range(600)]


def test_everything_is_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [SHORT, LONG, LONG_PROMPT, row("a", ""), {"messages": [{"role": "user", "content": "a"}]}, row("b", " ")]
    with caplog.at_level(logging.INFO):
        dataset = load(tmp_path, rows, max_tokens=40, unusable="drop")
    report = dataset.report
    assert (report.rows, report.sequences, report.truncated, report.dropped_too_long) == (6, 2, 1, 1)
    assert report.unusable == {"empty assistant turn": 2, "no assistant turn": 1}
    assert report.tokens == sum(s.num_tokens for s in dataset.sequences)
    assert report.loss_tokens == sum(s.num_rows for s in dataset.sequences)
    [record] = caplog.records
    assert (record.getMessage(), record.dataset, record.truncated) == ("dataset read", "train", 1)  # type: ignore[attr-defined]


def test_truncation_cuts_tokens_and_the_positions_that_predict_them(tmp_path: Path) -> None:
    [whole] = load(tmp_path, [LONG]).sequences
    [cut] = load(tmp_path, [LONG], max_tokens=40).sequences
    assert cut.num_tokens == 40
    assert cut.token_ids.tolist() == whole.token_ids[:40].tolist()
    assert cut.positions.tolist() == [p for p in whole.positions.tolist() if p <= 38]
    assert cut.token_ids.base is None
    assert cut.positions.base is None


def test_a_sequence_that_just_fits_is_not_touched(tmp_path: Path) -> None:
    [whole] = load(tmp_path, [LONG]).sequences
    for policy in ("truncate", "drop", "fail"):
        report = load(tmp_path, [LONG], max_tokens=whole.num_tokens, too_long=policy).report
        assert (report.sequences, report.truncated, report.dropped_too_long) == (1, 0, 0)
    assert load(tmp_path, [LONG], max_tokens=whole.num_tokens - 1).report.truncated == 1


def test_too_long_sequences_can_be_dropped_or_refused(tmp_path: Path) -> None:
    dropped = load(tmp_path, [SHORT, LONG], max_tokens=40, too_long="drop")
    assert (dropped.report.sequences, dropped.report.truncated, dropped.report.dropped_too_long) == (1, 0, 1)
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens, and data\.max_tokens is 40"):
        load(tmp_path, [SHORT, LONG], max_tokens=40, too_long="fail")


def test_unusable_rows_are_refused_by_default_with_place_and_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: empty assistant turn \(message 1\); `data\.unusable: drop`"):
        load(tmp_path, [SHORT, row("a", "")])


def test_the_first_bad_row_is_told_whichever_rule_it_breaks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: empty assistant turn"):
        load(tmp_path, [SHORT, row("a", ""), SHORT, {"messages": 3}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: messages must be a list"):
        load(tmp_path, [SHORT, {"messages": 3}, row("a", "")])
    [sequence] = load(tmp_path, [SHORT, {"messages": 3}], max_sequences=1).sequences
    assert TOKENIZER.decode(sequence.labels) == "It was.<|im_end|>"


def test_a_dataset_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    said = r"none of 3 rows can be trained on: 2 x empty assistant turn, 1 x too long for data\.max_tokens$"
    with pytest.raises(DataError, match=said):
        load(tmp_path, [row("a", ""), row("a", " "), LONG], max_tokens=40, unusable="drop", too_long="drop")


_PIECES = ("a", "It was so. ", "<|im_end|>", "<|eot|>", "\n\n", "é🎉", "</think>", " ", "Assistant: no")
_TEXTS = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=6).map("".join)


@settings(max_examples=50, deadline=None)
@given(
    family=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(_TEXTS, min_size=2, max_size=7),
    told=_TEXTS,
    limit=st.integers(8, 80),
)
def test_cutting_any_chat_takes_tokens_off_its_end_and_changes_none(
    family: str, contents: list[str], told: str, limit: int
) -> None:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[n % 2], content=text) for n, text in enumerate(contents))
    chat = Chat(messages=messages, origin="here", teacher_messages=(Message(role="user", content=told),))
    for context in (None, {"kind": "messages"}):
        tree = {"train": {"format": "chat", "path": "a.jsonl"}, "max_tokens": limit, "teacher_context": context}
        data = DataConfig.model_validate({**tree, "unusable": "drop"})
        encoder = build_encoder(chat_tokenizer(family), data)
        [whole] = encoder.encode([chat])
        if isinstance(whole, Unusable):
            continue
        kept = [sequence for sequence in whole if sequence.positions[0] <= limit - 2]
        if not kept:
            continue
        found = load_sequences("train", lambda: iter([chat]), encoder, data).sequences
        for one, other in zip(found, kept, strict=True):
            for cut, entire in ((one, other), (teacher_side([one])[0], teacher_side([other])[0])):
                assert cut.token_ids.tolist() == entire.token_ids.tolist()[: cut.num_tokens]
                assert cut.labels.tolist() == entire.labels.tolist()[: cut.num_rows]
            assert one.num_tokens <= limit
            assert one.labels.tolist() == teacher_side([one])[0].labels.tolist()
            assert one.num_rows == int((other.positions <= limit - 2).sum())


def test_only_the_first_sequences_are_taken_when_so_many_are_wanted(tmp_path: Path) -> None:
    dataset = load(tmp_path, [row("a", str(number)) for number in range(700)], max_sequences=3)
    assert [TOKENIZER.decode(s.labels) for s in dataset.sequences] == ["0<|im_end|>", "1<|im_end|>", "2<|im_end|>"]
    assert (dataset.report.sequences, dataset.report.rows < 700) == (3, True)
    assert dataset.report.tokens == sum(s.num_tokens for s in dataset.sequences)


def test_the_students_tokenizer_is_read_from_its_directory(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_fast_tokenizer(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert vocabulary_size(loaded) == len(TOKENIZER)


def test_a_directory_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer in"):
        load_fast_tokenizer(tmp_path / "absent")
    # transformers makes up a tokenizer of one token for such a directory.
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a fast one; it needs a tokenizer\.json"):
        load_fast_tokenizer(tmp_path)


def test_readers_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, kdmesh_trainer.config, kdmesh_trainer.data.files.readers, kdmesh.batching, kdmesh.tokens;"
        "sys.exit(' '.join({'torch', 'transformers', 'grpc', 'pyarrow'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr.strip() == ""
    )
