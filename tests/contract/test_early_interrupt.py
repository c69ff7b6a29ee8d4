"""Ctrl-C while a command is still being imported ends it with 130, and without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Presses Ctrl-C when a module is looked for.
_PRESS = """
import os, runpy, signal, sys
command, wanted, *sys.argv[1:] = sys.argv[1:]
class Finder:
    def find_spec(self, name, *_):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
if command == "kdmesh":
    from kdmesh.entry import main
    main()
else:
    runpy.run_module(command, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("kdmesh", "kdmesh.commands.cli"),
        ("kdmesh", "kdmesh.commands.top"),
        ("kdmesh_teacher", "pydantic"),
        ("kdmesh_rollout", "pydantic"),
        ("kdmesh_trainer", "pydantic"),
        ("kdmesh_trainer.commands.precompute", "pydantic"),
        ("kdmesh_trainer.commands.tokenize", "pydantic"),
        ("kdmesh_trainer.commands.evaluate", "pydantic"),
        ("kdmesh_trainer.commands.plan", "pydantic"),
    ],
)
def test_ctrl_c_during_imports(command: str, module: str) -> None:
    assert pressed(command, module, "top") == (130, "", "")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("precompute", "Stopped; what was computed is kept, and the same command goes on from there.\n"),
        ("tokenize", "Stopped; datasets that were complete are kept.\n"),
        ("evaluate", ""),
        ("plan", ""),
        ("read", ""),
    ],
)
def test_ctrl_c_while_a_command_of_the_trainer_works(command: str, says: str) -> None:
    config = str(ROOT / "examples/train-blend.yaml")
    assert pressed(f"kdmesh_trainer.commands.{command}", "torch", config) == (130, "", says)


def pressed(command: str, module: str, *arguments: str) -> tuple[int, str, str]:
    """How a command ends that is interrupted where it looks for a module: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-c", _PRESS, command, module, *arguments], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_that_is_ignored_stays_so() -> None:
    script = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from kdmesh.interrupt import quiet_interrupt
with quiet_interrupt():
    os.kill(os.getpid(), signal.SIGINT)
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
