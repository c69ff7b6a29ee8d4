"""Prefill through the teacher service against the same engine called in this process."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.end_to_end_inputs import VOCABULARY_SIZE, prepare
from benchmarks.measure import finish, say, server, table
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.types import TokenSequence
from kdmesh_teacher.config import TransformersEngine as EngineConfig
from kdmesh_teacher.engine import PrefillJob
from kdmesh_teacher.transformers_engine import TransformersEngine

_NUM_SEQUENCES, _NUM_TOKENS = 4, 1024
_WARM_UP = 2


def _sequences() -> tuple[TokenSequence, ...]:
    draw = np.random.default_rng(0)
    return tuple(
        TokenSequence(
            token_ids=draw.integers(0, VOCABULARY_SIZE, _NUM_TOKENS, dtype=np.int32),
            positions=np.arange(_NUM_TOKENS - 1, dtype=np.int32),
        )
        for _ in range(_NUM_SEQUENCES)
    )


async def _measure(address: str, engine: TransformersEngine, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each call in this process, then through the service, in turn."""
    sequences = _sequences()
    client = await TeacherClient.connect(address, SessionOptions(job="benchmark", door="shm"))
    size_bytes = sum(s.num_rows for s in sequences) * client.model.hidden_size * client.model.dtype.size_bytes
    out = memoryview(bytearray(size_bytes))
    inside: list[float] = []
    through: list[float] = []
    for _ in range(_WARM_UP + repeats):
        began_s = time.perf_counter()
        engine.prefill([PrefillJob(sequences=sequences, out=out)])
        inside.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        rows_RD = (await client.prefill(sequences, Deadline.after(120.0))).rows_RD
        through.append(time.perf_counter() - began_s)
        own_RD = torch.frombuffer(out, dtype=rows_RD.dtype).view(rows_RD.shape)
        if not torch.allclose(own_RD, rows_RD, rtol=1e-4, atol=1e-4):
            raise SystemExit("the service's rows differ from the engine's")
        del rows_RD
    await client.close()
    return inside[_WARM_UP:], through[_WARM_UP:]


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-end-to-end"), help="where the models lie")
    arguments = parser.parse_args()
    model = prepare(arguments.folder, num_chats=64).teacher
    engine = TransformersEngine(EngineConfig(model=model))
    engine.load()
    with tempfile.TemporaryDirectory() as folder:
        config, ready = Path(folder) / "teacher.yaml", Path(folder) / "ready.json"
        config.write_text(
            yaml.safe_dump(
                {
                    "engine": {"kind": "transformers", "model": str(model.resolve())},
                    "server": {"port": 0, "rest_port": 0},
                    "slab": {"slots": 4, "slots_per_session": 4},
                }
            ),
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "kdmesh_teacher", str(config), "--ready-file", str(ready)]
        with server(command, ready) as address:
            inside, through = asyncio.run(_measure(address, engine, arguments.repeats))
    ratio = statistics.median(b / a for a, b in zip(inside, through, strict=True))
    say(f"{_NUM_SEQUENCES} x {_NUM_TOKENS} tokens, {_NUM_TOKENS - 1} rows of each, medians of {len(inside)}:")
    table(
        ["call", "seconds", "tokens/s"],
        [
            [name, f"{statistics.median(s):.3f}", f"{_NUM_SEQUENCES * _NUM_TOKENS / statistics.median(s):.0f}"]
            for name, s in (("engine, in process", inside), ("service, shared memory", through))
        ],
    )
    say(f"service / engine, pair by pair: {ratio:.3f}")
    finish("service_overhead", {"ratio": round(ratio, 4), "engine_s": round(statistics.median(inside), 4)})


if __name__ == "__main__":
    main()
