"""What a service says is kept in a file, and a file that cannot be written costs no service."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kdmesh.errors import ConfigError
from kdmesh.launch import local
from kdmesh.launch.service_log import kept_in
from tests.support.full_disk import files_limited_to

# Far more than a pipe holds.
_TALKS = """
import json
print(json.dumps({"level": "warning", "event": "hot"}), flush=True)
for number in range(20_000):
    print(json.dumps({"level": "info", "event": "line", "number": number}), flush=True)
"""


def run(path: Path) -> list[str]:
    """What is shown of a service that says much and ends."""
    shown: list[str] = []
    with kept_in(path, show=shown.append) as on_line, local.Processes() as processes:
        command = local.Command(name="talker", argv=(sys.executable, "-c", _TALKS), on_line=on_line)
        processes.wait(processes.start(command))
    return shown


def test_every_line_is_kept_behind_those_of_earlier_runs_and_what_is_urgent_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "talker.log"
    for runs in (1, 2):
        (shown,) = run(path)
        assert '"hot"' in shown
        lines = path.read_text().splitlines()
        assert len(lines) == 20_001 * runs
        assert json.loads(lines[-1])["number"] == 19_999


def test_a_service_goes_on_when_the_disk_of_its_log_is_full(tmp_path: Path) -> None:
    with files_limited_to(1000):
        urgent, told = run(tmp_path / "talker.log")
    assert '"hot"' in urgent
    assert told == f"{tmp_path}/talker.log cannot be written, and lacks what comes now: File too large"
    assert (tmp_path / "talker.log").stat().st_size == 1000


def test_a_log_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "talker.log").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*/talker\.log: Is a directory"):
        run(tmp_path / "talker.log")
