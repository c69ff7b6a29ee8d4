"""Teacher servers with the real SGLang engine on the CPU, as processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.teacher_process import TeacherProcess, await_ready, started

STANDIN = Path(__file__).parent / "sglang_standin"
CHUNK_TOKENS = 128

# SGLang on a CPU needs to be told how much memory its KV cache may take.
_ARGUMENTS = {"max_total_tokens": 16384, "max_running_requests": 16}


def sglang_environment(**variables: str) -> dict[str, str]:
    """The environment of a process that is to import SGLang on a machine without a GPU."""
    paths = [str(STANDIN), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SGLANG_USE_CPU_ENGINE": "1"} | variables


def teacher_tree(model: Path) -> dict[str, dict[str, Any]]:
    """A configuration on free ports."""
    return {
        "engine": {
            "kind": "sglang",
            "model": str(model),
            "device": "cpu",
            "chunked_prefill_tokens": CHUNK_TOKENS,
            "arguments": _ARGUMENTS,
        },
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
        "slab": {"slots": 4, "slot_mib": 1, "slots_per_session": 4},
    }


def starting(
    directory: Path, model: Path, *, variables: Mapping[str, str] | None = None, **sections: dict[str, Any]
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A server that may not be ready yet; killed on exit if it still runs.

    Args:
        directory: for its files, short: Unix sockets have short names.
        model: of its engine.
        variables: of its environment.
        sections: laid over those of its configuration.
    """
    tree = teacher_tree(model)
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    path = directory / "teacher.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return started(directory, "-m", "kdmesh_teacher", str(path), environment=sglang_environment(**(variables or {})))


@contextlib.contextmanager
def sglang_teacher(directory: Path, model: Path, **sections: Any) -> Iterator[TeacherProcess]:
    """A server that is ready; killed on exit if it still runs."""
    with starting(directory, model, **sections) as process:
        yield await_ready(process)


def metric(teacher: TeacherProcess, name: str) -> float:
    """The value of a metric without labels."""
    for line in httpx.get(f"http://{teacher.rest}/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise AssertionError(f"no metric {name}")


def token_count(teacher: TeacherProcess) -> float:
    """Tokens prefilled, over all jobs."""
    lines = httpx.get(f"http://{teacher.rest}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("kdmesh_teacher_tokens_total{"))
