"""Rollout servers with the real SGLang engine on the CPU, as processes."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.sglang_teachers import sglang_environment
from tests.support.teacher_process import TeacherProcess, await_ready, started

# SGLang on a CPU needs to be told how much memory its KV cache may take.
_ARGUMENTS = {"max_total_tokens": 16384}


def rollout_tree(model: Path, **engine: Any) -> dict[str, dict[str, Any]]:
    """A configuration on free ports, with some keys of its engine replaced."""
    return {
        "engine": {
            "kind": "sglang",
            "model": str(model),
            "device": "cpu",
            "chunked_prefill_tokens": 128,
            "max_running": 16,
            "arguments": _ARGUMENTS,
        }
        | engine,
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
    }


def starting(
    directory: Path, model: Path, *, variables: Mapping[str, str] | None = None, **engine: Any
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A server that may not be ready yet; killed on exit if it still runs.

    Args:
        directory: for its files, short: Unix sockets have short names.
        model: of its engine.
        variables: of its environment.
        engine: more keys of its configuration.
    """
    path = directory / "rollout.yaml"
    path.write_text(yaml.safe_dump(rollout_tree(model, **engine)), encoding="utf-8")
    return started(directory, "-m", "kdmesh_rollout", str(path), environment=sglang_environment(**(variables or {})))


@contextlib.contextmanager
def sglang_rollout(directory: Path, model: Path, **options: Any) -> Iterator[TeacherProcess]:
    """A server that is ready; killed on exit if it still runs."""
    with starting(directory, model, **options) as process:
        yield await_ready(process)


def scheduler(server: TeacherProcess) -> psutil.Process:
    """The process of SGLang that computes."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [child for child in children if "scheduler" in _command(child)]
    return found


def _command(process: psutil.Process) -> str:
    """Empty of one that is dead, and perhaps not yet buried."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
