"""A teacher server of its own process with a fake engine, for benchmarks of what clients share."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.measure import Server, started
from kdmesh.types import TokenSequence

VOCABULARY_SIZE = 64


@contextlib.contextmanager
def shared_server(**sections: dict[str, Any]) -> Iterator[Server]:
    """A server of the configuration's sections, on free ports."""
    tree = {"server": {"port": 0, "rest_port": 0, "drain_s": 1}} | sections
    tree["engine"] = {"kind": "fake", "vocabulary_size": VOCABULARY_SIZE} | sections["engine"]
    with tempfile.TemporaryDirectory() as folder:
        config, ready = Path(folder) / "teacher.yaml", Path(folder) / "ready.json"
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")
        command = [sys.executable, "-m", "kdmesh_teacher", str(config), "--ready-file", str(ready)]
        with started(command, ready) as running:
            yield running


def job_states(server: Server) -> dict[str, dict[str, Any]]:
    """What REST says of each job, by name. Blocks."""
    with urllib.request.urlopen(f"http://{server.rest}/v1/jobs") as answer:  # the benchmark's own server
        return {state["job"]: state for state in json.load(answer)["jobs"]}


def request_of(num_tokens: int, *, rows: int = 1) -> tuple[TokenSequence, ...]:
    """One sequence, with the last positions wanted."""
    positions = np.arange(num_tokens - 1 - rows, num_tokens - 1, dtype=np.int32)
    ids = (np.arange(num_tokens) % VOCABULARY_SIZE).astype(np.int32)
    return (TokenSequence(token_ids=ids, positions=positions),)
