"""A server that takes weights as an engine does which keeps the memory of the version before for the next one.

`python -m benchmarks.weight_server READY_FILE SPECS_FILE` serves until it is told to end.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from kdmesh.rpc.boundary import Context
from kdmesh.rpc.server import serving
from kdmesh.rpc.weights.updates import WeightUpdates
from kdmesh.types import DType
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutServicer, add_RolloutServicer_to_server
from kdmesh.weights.manifest import Manifest, TensorSpec
from kdmesh.weights.staging import StagedTensors

FINGERPRINT = "benchmark"


class _SwappingTarget:
    """Two copies of the weights in turn, so that no page is touched for the first time after the second update."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._served, self._next = StagedTensors(specs), StagedTensors(specs)

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        return self._specs

    def begin(self) -> None:
        """There is room already."""

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        self._next.write(tensor, offset_bytes, data)

    def commit(self, version: int) -> None:
        self._served, self._next = self._next, self._served

    def discard(self) -> None:
        """What has come is overwritten next time."""


class _Servicer(RolloutServicer):
    def __init__(self, updates: WeightUpdates) -> None:
        self._updates = updates

    def UpdateWeights(
        self, request_iterator: AsyncIterator[pb.UpdateWeightsRequest], context: Context
    ) -> AsyncIterator[pb.UpdateWeightsReply]:
        return self._updates.answer(request_iterator)


async def _at_once(manifest: Manifest, commit: Callable[[], None]) -> None:
    commit()


async def _serve(ready: Path, specs: Sequence[TensorSpec]) -> None:
    updates = WeightUpdates(_SwappingTarget(specs), architecture_fingerprint=FINGERPRINT, apply=_at_once)
    servicer = _Servicer(updates)
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with serving(
        "kdmesh.v1.Rollout",
        lambda server: add_RolloutServicer_to_server(servicer, server),
        host="127.0.0.1",
        port=0,
    ) as server:
        writing = ready.with_suffix(".writing")
        writing.write_text(json.dumps({"grpc": f"127.0.0.1:{server.port}"}), encoding="utf-8")
        writing.rename(ready)
        await told.wait()
    updates.close()


if __name__ == "__main__":
    named = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    asyncio.run(_serve(Path(sys.argv[1]), [TensorSpec(name=n, shape=tuple(s), dtype=DType.BFLOAT16) for n, s in named]))
