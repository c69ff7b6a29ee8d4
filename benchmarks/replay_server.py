"""Serves rows that exist already, so that only the service is timed.

`python -m benchmarks.replay_server READY_FILE [CERTIFICATE KEY] [rdma]`.

The engine's copy into the slot is the real one (`index_select` with `out=`); no model runs. The first 8 bytes of
an answer are the monotonic clock, in nanoseconds, when the engine began to write it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kdmesh.allocator import keep_freed_memory
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.types import DType, HeadSpec
from kdmesh_teacher.config import TeacherConfig
from kdmesh_teacher.engine import EngineDescription, HeadParts, PrefillJob
from kdmesh_teacher.lifecycle import serve

HIDDEN_SIZE = 4096
NUM_ROWS = 8192
SLOT_MIB = NUM_ROWS * HIDDEN_SIZE * 2 / 2**20
VOCABULARY_SIZE = 64


class ReplayEngine:
    """Row p of every sequence is row p of one prepared [NUM_ROWS, HIDDEN_SIZE] bfloat16 tensor."""

    def load(self) -> EngineDescription:
        """Prepare the tensor."""
        torch.manual_seed(0)
        self._hidden_TD = torch.randn(NUM_ROWS, HIDDEN_SIZE).to(torch.bfloat16)
        return EngineDescription(
            name="replay",
            model_fingerprint="replay",
            tokenizer_fingerprint="",
            hidden_size=HIDDEN_SIZE,
            dtype=DType.BFLOAT16,
            head=HeadSpec(
                logit_scale=1.0,
                logit_softcap=None,
                vocabulary_size=VOCABULARY_SIZE,
                padded_vocabulary_size=VOCABULARY_SIZE,
                has_bias=False,
            ),
            max_sequence_tokens=NUM_ROWS + 1,
            max_batch_tokens=NUM_ROWS + 1,
            is_deterministic=True,
        )

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """Copy the wanted rows into each slot."""
        for job in jobs:
            began_ns = time.monotonic_ns()
            (sequence,) = job.sequences
            out_RD = torch.frombuffer(job.out, dtype=torch.bfloat16).view(-1, HIDDEN_SIZE)
            positions_R = torch.from_numpy(sequence.positions.astype(np.int64))
            torch.index_select(self._hidden_TD, 0, positions_R, out=out_RD)
            if sequence.num_rows > len(_PROBE_POSITIONS):  # not when the server tries the engine out
                job.out[:8] = began_ns.to_bytes(8, "little")

    def head_parts(self) -> HeadParts:
        """A head nobody uses."""
        return HeadParts(weight=memoryview(bytes(VOCABULARY_SIZE * HIDDEN_SIZE * 2)), bias=None, dtype=DType.BFLOAT16)


_PROBE_POSITIONS = range(64)


def main(ready_file: Path, *tls_files: str, has_rdma: bool) -> None:
    """Serve until SIGTERM, also by RDMA if wanted; encrypted with a certificate and its key where they are given."""
    keep_freed_memory(256 * 2**20)  # as the server's command does
    tls = dict(zip(("cert", "key"), tls_files, strict=True)) if tls_files else None
    config = TeacherConfig.model_validate(
        {
            "engine": {"kind": "fake"},
            "server": {"port": 0, "rest_port": 0, "tls": tls, "rdma": has_rdma, "groups": True},
            "slab": {"slots": 4, "slots_per_session": 2, "slot_mib": SLOT_MIB},
        }
    )

    def write_ready(addresses: Addresses) -> None:
        partial = ready_file.with_suffix(".partial")
        partial.write_text(json.dumps({"grpc": addresses.grpc}), encoding="utf-8")
        partial.rename(ready_file)

    async def run(directory: Path) -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await serve(config, ReplayEngine(), EngineThread(), directory=directory, stop=stop, on_ready=write_ready)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(file for file in sys.argv[2:] if file != "rdma"), has_rdma="rdma" in sys.argv)
