"""A 64 MiB answer from the engine's tensor to the trainer's, through the real server, client and doors."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.certificate import make_certificate
from benchmarks.measure import finish, say, server, table
from benchmarks.replay_server import HIDDEN_SIZE, NUM_ROWS
from kdmesh.allocator import keep_freed_memory
from kdmesh.auth.config import OPEN_ACCESS, AccessConfig, ClientTlsConfig
from kdmesh.handles.doors.door import Door
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.doors import DoorChoice, Wire
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.types import Handle, TokenSequence

BYTES = NUM_ROWS * HIDDEN_SIZE * 2
_WARM_UP = 6  # every slot is mapped once


@dataclass(slots=True)
class _TimedDoor:
    """Notes how long each fetch of the door behind it takes."""

    door: Door
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.door.name

    async def fetch(self, handle: Handle) -> Tensor:
        began_s = time.perf_counter()
        tensor = await self.door.fetch(handle)
        self.seconds.append(time.perf_counter() - began_s)
        return tensor

    def forget(self, handle: Handle) -> None:
        self.door.forget(handle)

    def close(self) -> None:
        self.door.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds, of every answer."""

    delivered: list[float]  # from the engine's first byte to a tensor in this process; nothing where rows are rounded
    asked: list[float]  # from the request to a tensor in this process
    fetched: list[float]  # from the handle to a tensor
    copied: list[float]  # one copy_ of as many bytes, measured in turn with the answers
    num_in_slab: int  # answers whose tensor is the server's own memory


def _is_in_slab(tensor: Tensor) -> bool:
    """Whether the tensor's bytes lie in a mapping of a slot, into which only the server's engine writes."""
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        span, *_, name = line.split(maxsplit=5)
        first, end = (int(address, 16) for address in span.split("-"))
        if first <= tensor.data_ptr() < end:
            return name.startswith("/memfd:kdmesh")
    return False


async def time_door(
    address: str, door: DoorChoice, repeats: int, access: AccessConfig = OPEN_ACCESS, wire: Wire = "exact"
) -> Timings:
    """Ask for `repeats` answers through one door, after some that do not count."""
    client = await TeacherClient.connect(address, SessionOptions(job="benchmark", door=door, access=access, wire=wire))
    client.door = timed = _TimedDoor(client.door)
    positions = np.arange(NUM_ROWS, dtype=np.int32)
    sequence = TokenSequence(token_ids=np.zeros(NUM_ROWS + 1, dtype=np.int32), positions=positions)
    source, target = torch.ones(BYTES // 2, dtype=torch.bfloat16), torch.zeros(BYTES // 2, dtype=torch.bfloat16)
    delivered: list[float] = []
    asked: list[float] = []
    copied: list[float] = []
    num_in_slab = 0
    for _ in range(_WARM_UP + repeats):
        began_s = time.perf_counter()
        target.copy_(source)
        copied.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        rows = (await client.prefill([sequence], Deadline.after(60.0))).rows_RD
        arrived_ns = time.monotonic_ns()
        asked.append(time.perf_counter() - began_s)
        began_ns = int.from_bytes(rows[0, :4].view(torch.uint8).numpy().tobytes(), "little")
        delivered.append((arrived_ns - began_ns) / 1e9)
        num_in_slab += _is_in_slab(rows)
        del rows
    await client.close()
    return Timings(
        delivered=delivered[_WARM_UP:],
        asked=asked[_WARM_UP:],
        fetched=timed.seconds[_WARM_UP:],
        copied=copied[_WARM_UP:],
        num_in_slab=num_in_slab,
    )


def _time_encrypted(folder: Path, repeats: int) -> Timings:
    """The stream through TLS."""
    tls, ready = make_certificate(folder), folder / "encrypted.json"
    command = [sys.executable, "-m", "benchmarks.replay_server", str(ready), str(tls.cert), str(tls.key)]
    access = AccessConfig(tls=ClientTlsConfig(ca=tls.cert))
    with server(command, ready) as address:
        return asyncio.run(time_door(address, "stream", repeats, access))


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60, help="answers measured at each door")
    repeats = parser.parse_args().repeats
    keep_freed_memory()  # as a trainer does
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        with server([sys.executable, "-m", "benchmarks.replay_server", str(ready)], ready) as address:
            shm = asyncio.run(time_door(address, "shm", repeats))
            few = max(10, repeats // 4)
            stream = asyncio.run(time_door(address, "stream", few))
            gloo = asyncio.run(time_door(address, "collective", few))
            fp8 = asyncio.run(time_door(address, "stream", few, wire="fp8"))
        encrypted = _time_encrypted(Path(folder), few)
    median = statistics.median
    say(f"{BYTES // 2**20} MiB answers ({NUM_ROWS} x {HIDDEN_SIZE} bfloat16), medians:")
    table(
        ["door", "engine to tensor", "GB/s", "of one copy_", "handle to tensor", "GB/s", "request to tensor"],
        [
            [
                name,
                "-" if t is fp8 else f"{median(t.delivered) * 1e3:.2f} ms",
                "-" if t is fp8 else f"{BYTES / median(t.delivered) / 1e9:.2f}",
                "-" if t is fp8 else f"{median(t.copied) / median(t.delivered):.2f}",
                f"{median(t.fetched) * 1e6:.0f} us",
                f"{BYTES / median(t.fetched) / 1e9:.2f}",
                f"{median(t.asked) * 1e3:.2f} ms",
            ]
            for name, t in (
                ("shared memory", shm),
                ("stream", stream),
                ("group of two, gloo", gloo),
                ("stream, TLS", encrypted),
                ("stream, fp8", fp8),
            )
        ],
    )
    copies = 1 + (shm.num_in_slab < _WARM_UP + repeats)
    say(f"copies of the bytes through shared memory: {copies}; {shm.num_in_slab} answers read where the engine wrote")
    finish(
        "transport",
        {
            "shm_fraction_of_copy": round(median(shm.copied) / median(shm.delivered), 3),
            "shm_gb_per_s": round(BYTES / median(shm.delivered) / 1e9, 2),
            "shm_copies": copies,
            "shm_handle_to_tensor_us": round(median(shm.fetched) * 1e6, 1),
            "stream_gb_per_s": round(BYTES / median(stream.delivered) / 1e9, 2),
            "stream_door_gb_per_s": round(BYTES / median(stream.fetched) / 1e9, 2),  # without the engine's copy
            "gloo_door_gb_per_s": round(BYTES / median(gloo.fetched) / 1e9, 2),
            "fp8_door_gb_per_s": round(BYTES / median(fp8.fetched) / 1e9, 2),  # of rows; half as much on the wire
            "encrypted_door_gb_per_s": round(BYTES / median(encrypted.fetched) / 1e9, 2),
            "copy_gb_per_s": round(BYTES / median(shm.copied) / 1e9, 2),
        },
    )


if __name__ == "__main__":
    main()
