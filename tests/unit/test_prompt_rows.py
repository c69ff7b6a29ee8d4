"""Which rows of a file of prompts are refused, and that each is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdmesh.errors import DataError
from kdmesh.image_files import ImageColumn, NoImages
from kdmesh.prompt_rows import Asked, Prompts

TEXT_ALONE = ImageColumn(source=NoImages("text alone"), name=None)


def read(tmp_path: Path, line: str) -> Asked:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hi"}\n' + line + "\n", encoding="utf-8")
    _, asked = Prompts(path).rows(TEXT_ALONE)
    return asked


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a\ud83d"},
        {"prompt": "a", "system": "a\udc00"},
        {"messages": [{"role": "user", "content": "a\ud83d"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a\ud83d"}]}]},
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path, row: object) -> None:
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2: messages\[0\] is not Unicode text: half .* 1"):
        read(tmp_path, json.dumps(row))


@pytest.mark.parametrize("line", ["{", "9" * 5000, "[" * 200_000])
def test_what_is_no_json_that_python_reads_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2 is not JSON"):
        read(tmp_path, line)


def test_whole_pairs_and_what_nobody_asks_are_taken(tmp_path: Path) -> None:
    asked = read(tmp_path, '{"prompt": "\\ud83d\\ude00", "note": "\\ud83d"}')
    assert asked.messages == [{"role": "user", "content": "😀"}]


def test_a_prompt_may_be_turns_as_in_datasets(tmp_path: Path) -> None:
    asked = read(tmp_path, '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}')
    assert asked.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(DataError, match=r"line 2 has neither `messages`.* nor `prompt`, a text or a list of turns"):
        read(tmp_path, '{"prompt": ["u"]}')
