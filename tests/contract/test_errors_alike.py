"""Whatever process a command runs in, an error that ends it is told in the same form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("evaluate", "plan", "precompute", "read", "tokenize")


@pytest.mark.parametrize(
    "module",
    ["kdmesh_teacher", "kdmesh_rollout", "kdmesh_trainer", *(f"kdmesh_trainer.commands.{name}" for name in COMMANDS)],
)
def test_an_error_begins_as_those_of_kdmesh_itself(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "gone.yaml"], capture_output=True, text=True, timeout=60)
    said = "Error: cannot read gone.yaml: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_every_command_of_the_trainer_is_held() -> None:
    modules = {path.stem for path in (ROOT / "services/trainer/kdmesh_trainer/commands").glob("*.py")}
    assert modules - {"__init__", "running"} == set(COMMANDS)
