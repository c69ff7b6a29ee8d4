"""One SGLang engine in a process of its own, which prefills what it is told and says how long that took.

    python -m benchmarks.sglang_child MODE MODEL_DIRECTORY

MODE: `rows` is our engine, `rows-uncached` the same without prefix cache, `plain` SGLang that returns no hidden
states, `stock` SGLang's own return of them. Every line on standard input is a JSON list of [token ids, first wanted
position]; every line on standard output is {"seconds": ..., "computed_tokens": ...}, but the first, which says that it
is ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdmesh.handles.slab.memory import create_segment
from kdmesh.types import DType, TokenSequence
from kdmesh_teacher.engine import PrefillJob
from kdmesh_teacher.sglang.config import SglangEngine as EngineConfig

Prefill = Callable[[Sequence[TokenSequence]], int]
"""Computes sequences; returns how many tokens that took."""

_ARGUMENTS = {"max_total_tokens": 32768, "max_running_requests": 64}


def _rows(config: EngineConfig) -> Prefill:
    from kdmesh_teacher.sglang.engine import SglangEngine

    engine = SglangEngine(config)
    row_bytes = (described := engine.load()).hidden_size * described.dtype.size_bytes
    segment = create_segment(256 * 2**20, engine)

    def prefill(sequences: Sequence[TokenSequence]) -> int:
        job = PrefillJob(
            sequences=tuple(sequences),
            out=segment.writable[: sum(s.num_rows for s in sequences) * row_bytes],
            segment=segment.number,
        )
        before = engine.num_cached_tokens()
        engine.prefill([job])
        return job.num_tokens - (engine.num_cached_tokens() - before)

    return prefill


def _stock(config: EngineConfig, *, returns_rows: bool) -> Prefill:
    from sglang.srt.entrypoints.engine import Engine

    from kdmesh.sglang.arguments import server_arguments

    arguments = server_arguments(config, DType.FLOAT32) | {
        "enable_return_hidden_states": returns_rows,
        "disable_overlap_schedule": True,  # as with our rows
    }
    engine = Engine(**arguments)

    def prefill(sequences: Sequence[TokenSequence]) -> int:
        answers: list[dict[str, Any]] = engine.generate(
            input_ids=[sequence.token_ids.tolist() for sequence in sequences],
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_hidden_states=returns_rows,
        )
        meta = [answer["meta_info"] for answer in answers]
        if returns_rows:
            # It leaves out the rows of what came out of the cache.
            rows = [len(m["hidden_states"][0]) + m["cached_tokens"] for m in meta]
            assert rows == [sequence.num_tokens for sequence in sequences]
        return sum(m["prompt_tokens"] - m["cached_tokens"] for m in meta)

    return prefill


def main() -> None:
    """Serve standard input until it ends."""
    mode, model = sys.argv[1], Path(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SGLang's processes have what is left of standard output
    asyncio.set_event_loop(asyncio.new_event_loop())
    config = EngineConfig(
        kind="sglang",
        model=model,
        dtype="float32",
        device="cpu",
        prefix_cache=mode != "rows-uncached",
        arguments=_ARGUMENTS,
    )
    prefill = _rows(config) if mode.startswith("rows") else _stock(config, returns_rows=mode == "stock")
    out.write("{}\n")
    out.flush()
    for line in sys.stdin:
        sequences = [
            TokenSequence(
                token_ids=np.array(ids, dtype=np.int32), positions=np.arange(first, len(ids) - 1, dtype=np.int32)
            )
            for ids, first in json.loads(line)
        ]
        began_s = time.perf_counter()
        computed = prefill(sequences)
        out.write(json.dumps({"seconds": time.perf_counter() - began_s, "computed_tokens": computed}) + "\n")
        out.flush()
    os._exit(0)  # SGLang's processes end with their parent


if __name__ == "__main__":
    main()
