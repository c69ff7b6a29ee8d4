"""A second epoch from the teacher's cache against the first, which its engine computes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.end_to_end_inputs import VOCABULARY_SIZE, prepare
from benchmarks.measure import finish, say, server, table
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence

_NUM_SEQUENCES, _NUM_TOKENS, _PER_REQUEST = 16, 512, 4
_AHEAD = 2  # requests under way
_ROW_BYTES = 512 * 4  # of the teacher
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """One server's."""

    first_s: float
    first_tokens: int  # prefilled
    later_s: list[float]
    later_tokens: int  # prefilled in all of them


def _sequences() -> list[TokenSequence]:
    draw = np.random.default_rng(0)
    return [
        TokenSequence(
            token_ids=draw.integers(0, VOCABULARY_SIZE, _NUM_TOKENS, dtype=np.int32),
            positions=np.arange(_NUM_TOKENS - 1, dtype=np.int32),
        )
        for _ in range(_NUM_SEQUENCES)
    ]


def _epoch(pool: TeacherPool, sequences: Sequence[TokenSequence], *, seed: int) -> float:
    """Seconds for all rows, in an order of its own."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    groups = [[sequences[i] for i in order[k : k + _PER_REQUEST]] for k in range(0, len(order), _PER_REQUEST)]
    began_s = time.perf_counter()
    waiting = [pool.submit(group) for group in groups[:_AHEAD]]
    for number in range(len(groups)):
        waiting.pop(0).wait()
        if number + _AHEAD < len(groups):
            waiting.append(pool.submit(groups[number + _AHEAD]))
    return time.perf_counter() - began_s


def _prefilled(rest: str) -> int:
    with urllib.request.urlopen(f"http://{rest}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("kdmesh_teacher_tokens_total{")))


def _until_written(rest: str) -> None:
    """Files are written after the answer."""
    while True:
        with urllib.request.urlopen(f"http://{rest}/v1/cache") as answer:
            state = json.load(answer)
        if state["directory"]["entries"] == _NUM_SEQUENCES:
            return


def _forget(directory: Path) -> None:
    """Have the kernel read the files from the disk the next time."""
    for path in directory.glob("??/*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _run(model: Path, cache: dict[str, Any], *, repeats: int) -> Epochs:
    sequences = _sequences()
    with tempfile.TemporaryDirectory() as folder:
        config, ready = Path(folder) / "teacher.yaml", Path(folder) / "ready.json"
        if "directory_mib" in cache:
            cache = {**cache, "directory": str(Path(folder) / "rows")}
        tree = {
            "engine": {"kind": "transformers", "model": str(model.resolve())},
            "server": {"port": 0, "rest_port": 0},
            "slab": {"slots": 8, "slots_per_session": 8, "slot_mib": 16},
            "cache": cache,
        }
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")
        command = [sys.executable, "-m", "kdmesh_teacher", str(config), "--ready-file", str(ready)]
        with server(command, ready) as address, TeacherPool([address], job="benchmark") as pool:
            rest = json.loads(ready.read_text(encoding="utf-8"))["rest"]
            before = _prefilled(rest)
            first_s = _epoch(pool, sequences, seed=0)
            after = _prefilled(rest)
            later_s = []
            for seed in range(1, 1 + repeats):
                if "directory" in cache:
                    _until_written(rest)
                    _forget(Path(cache["directory"]))
                later_s.append(_epoch(pool, sequences, seed=seed))
            return Epochs(
                first_s=first_s,
                first_tokens=after - before,
                later_s=later_s,
                later_tokens=_prefilled(rest) - after,
            )


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="later epochs")
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-end-to-end"), help="where the models lie")
    arguments = parser.parse_args()
    model, repeats = prepare(arguments.folder, num_chats=64).teacher, arguments.repeats
    found = {
        "none": _run(model, {}, repeats=1),
        "memory": _run(model, {"memory_mib": 256}, repeats=repeats),
        "files, from the disk": _run(model, {"directory_mib": 256}, repeats=repeats),
    }
    tokens = _NUM_SEQUENCES * _NUM_TOKENS
    size_bytes = _NUM_SEQUENCES * (_NUM_TOKENS - 1) * _ROW_BYTES
    say(f"{_NUM_SEQUENCES} sequences of {_NUM_TOKENS} tokens, {size_bytes / _MIB:.1f} MiB of rows, in requests of 4:")
    rows = []
    for name, epochs in found.items():
        later_s = statistics.median(epochs.later_s)
        rows.append(
            [
                name,
                f"{tokens / epochs.first_s:,.0f}",
                f"{epochs.first_tokens:,}",
                f"{tokens / later_s:,.0f}",
                f"{epochs.later_tokens // len(epochs.later_s):,}",
                f"{size_bytes / later_s / 1e9:.2f}",
            ]
        )
    table(["cache", "epoch 1 tokens/s", "prefilled", "epoch 2 tokens/s", "prefilled", "epoch 2 GB/s"], rows)
    finish(
        "cache",
        {
            name: {
                "first_tokens_per_s": round(tokens / epochs.first_s),
                "later_tokens_per_s": round(tokens / statistics.median(epochs.later_s)),
                "later_prefilled": epochs.later_tokens,
            }
            for name, epochs in found.items()
        },
    )


if __name__ == "__main__":
    main()
