"""Client channels over networks that are not as fast as this machine's own."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc._cython import cygrpc

from kdmesh.rpc import channel, server
from kdmesh.rpc.channel import open_channel
from kdmesh.v1 import rollout_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from tests.support.weight_server import weight_server
from tests.support.weight_targets import MemoryTarget, random_weights

_GRPC = Path(cygrpc.__file__).read_bytes()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, takes_s: float) -> None:
    with contextlib.suppress(ConnectionError):  # one end has gone
        while octets := await reader.read(2**16):
            await asyncio.sleep(takes_s)
            writer.write(octets)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def _far_away(address: str, *, takes_s: float) -> AsyncIterator[str]:
    """The same server behind a network on which everything takes so long, one way."""
    host, _, port = address.rpartition(":")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        its_reader, its_writer = await asyncio.open_connection(host, int(port))
        carrying.create_task(_carry(reader, its_writer, takes_s=takes_s))
        carrying.create_task(_carry(its_reader, writer, takes_s=takes_s))

    async with asyncio.TaskGroup() as carrying, await asyncio.start_server(connected, "127.0.0.1", 0) as proxy:
        yield f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(("name", "value"), sorted({*channel._OPTIONS, *server._OPTIONS}))
def test_grpc_knows_every_option(name: str, value: object) -> None:
    """It takes what it does not know without a word."""
    assert f"{name}\0".encode() in _GRPC


async def test_a_server_that_is_far_away_is_reached_at_the_first_attempt() -> None:
    async with (
        weight_server(MemoryTarget(list(random_weights({"norm": (3,)}, seed=0)))) as (address, _),
        _far_away(address, takes_s=0.15) as proxy,
        open_channel(proxy) as far,
    ):
        described = await RolloutStub(far).Describe(pb.DescribeRolloutRequest(), timeout=10)
        assert described.weight_version == 0


# In a process of its own: grpc reads how much it may say when it is imported.
_CUT_OFF = """
import asyncio
from kdmesh.rpc.channel import open_channel
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.v1.weights_pb2 import UpdateWeightsRequest
import grpc

async def hang(requests, context):
    await asyncio.Event().wait()
    yield b""

async def main():
    server = grpc.aio.server()
    methods = {"UpdateWeights": grpc.stream_stream_rpc_method_handler(hang)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("kdmesh.v1.Rollout", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = RolloutStub(channel).UpdateWeights()
        await call.write(UpdateWeightsRequest())
        await asyncio.sleep(0.1)
        await server.stop(0)
        print(await call.code())

asyncio.run(main())
"""


def test_a_server_that_ends_is_told_by_us_and_not_by_grpc_too() -> None:
    done = subprocess.run([sys.executable, "-c", _CUT_OFF], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("StatusCode.UNAVAILABLE\n", "")
