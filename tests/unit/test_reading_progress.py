"""What the log says of a dataset while it is read into memory."""

from __future__ import annotations

import json
import logging
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdmesh_trainer.data import reading_progress
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.prompts import PromptPolicy, load_prompts
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig
from tests.support.chat_tokenizers import chat_tokenizer

CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize("are_prompts", [False, True])
def test_a_dataset_that_takes_long_to_read_is_not_read_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, are_prompts: bool
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps({'messages': CHAT})}\n" * 7)
    seconds = count(step=4)  # passed at every look
    monkeypatch.setattr(reading_progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    data = ChatFile(format="chat", path=path)
    reader, encoder = open_dataset(data), ChatEncoder(chat_tokenizer("chatml"))
    with caplog.at_level(logging.INFO):
        if are_prompts:
            load_prompts("train", reader, encoder, PromptPolicy(max_tokens=64, too_long="fail", unusable="fail"))
        else:
            load_sequences("train", reader, encoder, DataConfig(train=data, max_tokens=64))
    said = [vars(record) for record in caplog.records if record.message == "tokenising"]
    assert [(each["dataset"], each["rows"], each["rows_per_second"]) for each in said] == [
        ("train", 2, round(2 / 12, 1)),
        ("train", 5, round(5 / 24, 1)),
    ]
