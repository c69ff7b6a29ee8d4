"""What a demo found can be told on every terminal, whatever its directory is called."""

from __future__ import annotations

import io
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kdmesh.demo import table
from kdmesh.demo.record import Evaluation


def test_the_table_is_told_in_letters_that_all_have_and_the_report_by_its_whole_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    found = Evaluation(**{field.name: 1 for field in fields(Evaluation)})
    table._print(found, [("sft", found), ("kd", found)], "A sentence.", Path("runs/[a]/[/b]/report.html"))
    out.seek(0)
    told = out.read()
    assert "KL(teacher || model)" in told
    assert "Report: runs/[a]/[/b]/report.html" in told
