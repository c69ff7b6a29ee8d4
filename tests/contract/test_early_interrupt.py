"""Ctrl-C while a command is still being imported ends it with 130, and without a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Presses Ctrl-C when a module is looked for.
_PRESS = """
import os, runpy, signal, sys
command, wanted = sys.argv[1:]
sys.argv[1:] = ["top"]
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
    done = subprocess.run([sys.executable, "-c", _PRESS, command, module], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


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
