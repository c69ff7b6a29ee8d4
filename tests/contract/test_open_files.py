"""A service has as many files open as it may, and refuses to start where that is too few."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial

import pytest

_RAISED = """
import resource
from kdmesh.open_files import raise_open_files
raise_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def python(*words: str, soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limit)


@pytest.mark.parametrize(
    "module", ["kdmesh_teacher", "kdmesh_rollout", "kdmesh_trainer", "kdmesh_trainer.commands.precompute"]
)
def test_too_few_are_refused_in_a_sentence(module: str) -> None:
    done = python("-m", module, "gone.yaml", soft=24, hard=24)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: this process may have 24 files open at most, and needs 128: raise the limit")


@pytest.mark.parametrize(("soft", "hard"), [(24, 300), (300, 300)])
def test_a_low_limit_is_raised_to_what_is_allowed(soft: int, hard: int) -> None:
    done = python("-c", _RAISED, soft=soft, hard=hard)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"({hard}, {hard})\n", "")
