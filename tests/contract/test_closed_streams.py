"""A command that is started without standard streams, as by some daemons, does what it does with them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import losses, write_config

KDMESH = str(Path(sys.executable).with_name("kdmesh"))


@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ([KDMESH, "train"], "<&- >&- 2>&-"),
        ([KDMESH, "train"], "2>&-"),
        ([sys.executable, "-m", "kdmesh_trainer"], ">&-"),
    ],
)
def test_a_job_without_streams_is_done(
    tiny_models: TinyModels, tmp_path: Path, command: list[str], closed: str
) -> None:
    config = write_config(
        tmp_path, student=tiny_models.path("qwen3", seed=1), teacher=None, steps=2, objective={"name": "sft"}
    )
    words = shlex.join([*command, str(config)])
    done = subprocess.run(
        ["sh", "-c", f"exec {words} {closed}"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run").keys() == {0, 1}
