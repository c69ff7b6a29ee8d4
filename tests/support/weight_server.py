"""A server of which nothing is real but UpdateWeights.

`python -m tests.support.weight_server READY_FILE SPECS_JSON SECONDS_PER_WRITE PORT FINGERPRINT REACH` is one in a
process of its own; READY_FILE then says where it listens. It tells the digest of what it serves as its model's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias, cast

import grpc
import torch

from kdmesh.errors import Unavailable
from kdmesh.rpc import codec
from kdmesh.rpc.boundary import Context
from kdmesh.rpc.server import serving
from kdmesh.rpc.weights import source as weight_source
from kdmesh.rpc.weights.updates import Apply, WeightUpdates
from kdmesh.types import DType
from kdmesh.v1 import rollout_pb2, weights_pb2
from kdmesh.v1.rollout_pb2_grpc import RolloutServicer, RolloutStub, add_RolloutServicer_to_server
from kdmesh.weights.digests import digest
from kdmesh.weights.manifest import Manifest, TensorSpec
from tests.support.weight_targets import FINGERPRINT, MemoryTarget

ROOT = Path(__file__).parents[2]

Reach: TypeAlias = Literal["all", "groups", "nothing"]
"""What a server process finds of a sender's doors: all of them, its groups but not its memory, neither."""


async def at_once(manifest: Manifest, commit: Callable[[], None]) -> None:
    """Nothing is being sampled."""
    await asyncio.to_thread(commit)


class _Servicer(RolloutServicer):
    def __init__(self, target: MemoryTarget, updates: WeightUpdates, fingerprint: str) -> None:
        self._target = target
        self._updates = updates
        self._fingerprint = fingerprint

    async def Describe(
        self, request: rollout_pb2.DescribeRolloutRequest, context: Context
    ) -> rollout_pb2.DescribeRolloutResponse:
        return rollout_pb2.DescribeRolloutResponse(
            model_name=served_digest(self._target),
            weight_version=self._updates.version,
            dtype=codec.DTYPES.to_wire(self._target.tensor_specs()[0].dtype),
            architecture_fingerprint=self._fingerprint,
        )

    def UpdateWeights(
        self, request_iterator: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: Context
    ) -> AsyncIterator[weights_pb2.UpdateWeightsReply]:
        return self._updates.answer(request_iterator)


def served_digest(target: MemoryTarget) -> str:
    """Of all bytes that are served, in the order of the names."""
    tensors = [tensor.reshape(-1).view(torch.uint8) for _, tensor in sorted(target.served.items())]
    return digest(torch.cat(tensors).numpy().data).hex() if tensors else ""


@contextlib.asynccontextmanager
async def weight_server(
    target: MemoryTarget,
    *,
    apply: Apply = at_once,
    silence_s: float = 60,
    port: int = 0,
    fingerprint: str = FINGERPRINT,
) -> AsyncIterator[tuple[str, WeightUpdates]]:
    """Its address, and what answers there."""
    updates = WeightUpdates(target, architecture_fingerprint=fingerprint, apply=apply, silence_s=silence_s)
    servicer = _Servicer(target, updates, fingerprint)
    add = lambda server: add_RolloutServicer_to_server(servicer, server)  # noqa: E731
    async with serving("kdmesh.v1.Rollout", add, host="127.0.0.1", port=port) as server:
        yield f"127.0.0.1:{server.port}", updates
    updates.close()


class SlowTarget(MemoryTarget):
    """Takes a while for each part."""

    seconds_per_write = 0.0

    def write(self, tensor: int, offset_bytes: int, data: memoryview) -> None:
        """Copy, later."""
        time.sleep(self.seconds_per_write)
        super().write(tensor, offset_bytes, data)


def served_by(address: str) -> tuple[int, str]:
    """Version, and digest of the bytes."""
    with grpc.insecure_channel(address) as channel:
        described = RolloutStub(channel).Describe(rollout_pb2.DescribeRolloutRequest(), timeout=20)
    return described.weight_version, described.model_name


@contextlib.contextmanager
def weight_server_process(
    ready: Path,
    specs: Sequence[TensorSpec],
    *,
    seconds_per_write: float = 0,
    port: int = 0,
    fingerprint: str = FINGERPRINT,
    reach: Reach = "all",
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address; killed at the end."""
    ready.unlink(missing_ok=True)
    named = json.dumps([[spec.name, spec.shape, spec.dtype.value] for spec in specs])
    arguments = [str(ready), named, str(seconds_per_write), str(port), fingerprint, reach]
    process = subprocess.Popen([sys.executable, "-m", "tests.support.weight_server", *arguments], cwd=ROOT)
    try:
        ends_s = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < ends_s, "the server did not start"
            time.sleep(0.02)
        yield process, ready.read_text()
    finally:
        process.kill()
        process.wait()


def _narrow(reach: Reach) -> None:
    """Let this process find no more than `reach` says."""

    def fail(*arguments: object, **named: object) -> NoReturn:
        raise Unavailable("out of reach")

    if reach != "all":
        setattr(weight_source.ShmDoor, "connect", fail)  # noqa: B010
    if reach == "nothing":
        setattr(weight_source, "reach", fail)  # noqa: B010


async def _main(ready: Path, named: str, seconds_per_write: float, port: int, fingerprint: str) -> None:
    specs = [TensorSpec(name=name, shape=tuple(shape), dtype=DType(dtype)) for name, shape, dtype in json.loads(named)]
    target = SlowTarget(specs)
    target.seconds_per_write = seconds_per_write
    async with weight_server(target, port=port, fingerprint=fingerprint) as (address, _):
        writing = ready.with_suffix(".writing")
        writing.write_text(address)
        writing.rename(ready)
        await asyncio.Event().wait()


if __name__ == "__main__":
    _narrow(cast(Reach, sys.argv[6]))
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
