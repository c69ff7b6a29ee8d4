"""A file's digest is kept, and read from the file again where what was kept cannot be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdmesh_trainer.data.files.file_digests import FileDigests


def test_a_digest_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    digests, file = FileDigests(tmp_path / "kept"), tmp_path / "data.jsonl"
    file.write_text("one")
    assert digests.known(file) is None
    first = digests.read(file)
    assert digests.known(file) == first
    file.write_text("other")
    assert digests.known(file) is None
    assert digests.read(file) != first


@pytest.mark.parametrize("damaged", [b"", b"0123", b"\xb0" * 32, b"g" * 32, b"0" * 33])
def test_a_digest_that_was_left_empty_or_is_damaged_is_none(tmp_path: Path, damaged: bytes) -> None:
    digests, file = FileDigests(tmp_path / "kept"), tmp_path / "data.jsonl"
    file.write_text("one")
    first = digests.read(file)
    [kept] = (tmp_path / "kept").iterdir()
    kept.write_bytes(damaged)
    assert digests.known(file) is None
    assert digests.read(file) == first == kept.read_text()
