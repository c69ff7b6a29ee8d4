"""A run's record that a kill or a disk has damaged does not keep the run from going on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kdmesh_trainer.saving.files import append_line, keep_lines

WHOLE = [{"step": step, "text": "\u2028ü"} for step in range(4)]


def is_before_3(line: Mapping[str, Any]) -> bool:
    return bool(line["step"] < 3)


def told(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [vars(record)["lines"] for record in caplog.records if record.levelname == "WARNING"]


def test_a_last_line_that_was_never_finished_is_dropped_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    for line in WHOLE:
        append_line(path, line)
    before = path.read_bytes()
    path.write_bytes(before + b'{"step": 1')
    assert keep_lines(path, is_before_3) == WHOLE[:3]
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert keep_lines(path, is_before_3) == WHOLE[:3]  # all of it was there
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
    assert told(caplog) == []


@pytest.mark.parametrize(
    "damaged", [b'{"step": 1, "te', b'{"stfp": 1}', b'{"step": "1"}', b"5", b"[]", b"null", b'{"step": 1, "t": "\xb0"}']
)
def test_a_damaged_line_is_dropped_alone_and_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    for line in WHOLE:
        append_line(path, line)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], damaged + b"\n", *lines[2:]]))
    assert keep_lines(path, is_before_3) == [WHOLE[0], WHOLE[2]]
    assert told(caplog) == [1]
    assert keep_lines(path, is_before_3) == [WHOLE[0], WHOLE[2]]
    assert told(caplog) == [1]
