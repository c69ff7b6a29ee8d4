"""Consumers of handles as real processes, which tests can question, stop and kill.

`python -m tests.support.handles_consumer SOCKET` imports torch once, and forks one consumer for each connection to
SOCKET. A consumer answers one JSON line with one JSON line. The parent reaps none of them, so that no number of a dead
consumer comes to mean another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kdmesh import errors
from kdmesh.handles.doors import shm as shm_door
from kdmesh.handles.doors.shm import ShmDoor
from kdmesh.types import DType, Handle

ROOT = Path(__file__).parents[2]


def digest(data: bytes | memoryview) -> str:
    """What both sides compare instead of bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


async def until(condition: Callable[[], bool], *, within_s: float = 5.0) -> float:
    """Seconds until the condition held."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    while not condition():
        assert loop.time() - begin < within_s, "it did not come true in time"
        await asyncio.sleep(0.001)
    return loop.time() - begin


class Consumer:
    """The test's end of one consumer process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int) -> None:
        self.pid = pid
        self._reader = reader
        self._writer = writer

    async def ask(self, op: str, **arguments: Any) -> Any:
        """What the operation returns. Raises the kdmesh error that it raised."""
        await self.tell(op, **arguments)
        line = await asyncio.wait_for(self._reader.readline(), 20)
        if not line:
            raise ConnectionError("the consumer is dead")
        reply = json.loads(line)
        if "error" in reply:
            raise getattr(errors, reply["error"])(reply["message"])
        return reply["value"]

    async def tell(self, op: str, **arguments: Any) -> None:
        """Ask, and leave the reply unread."""
        if handle := arguments.get("handle"):
            arguments["handle"] = dataclasses.asdict(handle) | {"token": handle.token.hex()}
        self._writer.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        await self._writer.drain()

    async def connect(self, socket_path: Path, session: bytes, nonce: bytes) -> None:
        """Open its shared-memory door."""
        await self.ask("connect", path=str(socket_path), session=session.hex(), nonce=nonce.hex())

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def close(self) -> None:
        """End it."""
        self._writer.close()
        self.signal(signal.SIGKILL)


class Consumers:
    """Starts consumers."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[Consumer]:
        """A consumer that ends with the `with`."""
        reader, writer = await asyncio.open_unix_connection(str(self._socket_path))
        consumer = Consumer(reader, writer, int(await reader.readline()))
        try:
            yield consumer
        finally:
            consumer.close()
            await writer.wait_closed()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Consumers]:
    """The process that makes consumers."""
    path = directory / "consumers.sock"
    command = [sys.executable, "-m", "tests.support.handles_consumer", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield Consumers(path)
        finally:
            process.terminate()


class _Process:
    """The consumer's own side. A method is an operation."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    async def connect(self, path: str, session: str, nonce: str) -> None:
        self.door = await ShmDoor.connect(Path(path), bytes.fromhex(session), bytes.fromhex(nonce))

    async def fetch(self, handle: dict[str, Any], name: str = "rows") -> str:
        token, dtype = bytes.fromhex(handle.pop("token")), DType(handle.pop("dtype"))
        self.tensors[name] = await self.door.fetch(Handle(token=token, dtype=dtype, **handle))
        return self.look(name)

    def look(self, name: str = "rows") -> str:
        return digest(self.tensors[name].view(torch.uint8).numpy().data)

    def drop(self, name: str = "rows") -> None:
        del self.tensors[name]

    async def use(self, handle: dict[str, Any], value: float) -> bool:
        """Whether every element is `value`, now and a little later."""
        await self.fetch(handle)
        is_right = bool((self.tensors["rows"] == value).all())
        await asyncio.sleep(0.002)
        is_right &= bool((self.tensors["rows"] == value).all())
        self.drop()
        return is_right

    def close_door(self) -> None:
        self.door.close()

    def fork_with_socket(self) -> int:
        """A child that has the broker's socket open, as one that was forked without Python's hooks has."""
        (wire,) = shm_door._wires
        copy = os.dup(wire.sock.fileno())
        pid = os.fork()
        if pid == 0:
            signal.pause()
        os.close(copy)
        return pid

    def fork_and_die_there(self) -> str:
        """What a forked child can still do with a tensor's memory and socket."""
        (wire,) = shm_door._wires
        pid = os.fork()
        if pid == 0:
            is_closed = wire.sock.fileno() == -1
            self.tensors.clear()
            gc.collect()
            os._exit(0 if is_closed else 1)
        return "closed" if os.waitpid(pid, 0)[1] == 0 else "open"

    def mappings(self) -> int:
        """Of segments, in this process."""
        return sum("memfd:kdmesh" in line for line in Path("/proc/self/maps").read_text().splitlines())

    def descriptors(self) -> int:
        """Open in this process."""
        return len(os.listdir("/proc/self/fd"))


async def _consume(connection: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    writer.write(f"{os.getpid()}\n".encode())
    process = _Process()
    while line := await reader.readline():
        request = json.loads(line)
        try:
            value = getattr(process, request.pop("op"))(**request)
            if inspect.isawaitable(value):
                value = await value
            reply = {"value": value}
        except errors.KdmeshError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        writer.write(json.dumps(reply).encode() + b"\n")
        await writer.drain()


def main(path: str) -> None:
    """Fork a consumer per connection, for ever."""
    torch.set_num_threads(1)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            asyncio.run(_consume(connection))
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
