"""A client that asks for samples and does not read them costs the server no more than a little, for a while."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kdmesh.rpc import reply_stream
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts import codec as rollout_codec
from kdmesh.rpc.rollouts.client import Ask
from kdmesh.types import Sampling
from kdmesh.v1 import rollout_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from tests.support.rollout_samples import prompt
from tests.support.rollout_server import RunningRollout, running_rollout

# Whatever lies in buffers on the way is small.
_OPTIONS = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))


@contextlib.asynccontextmanager
async def stream_that_nobody_reads(server: RunningRollout) -> AsyncIterator[Any]:
    """A Generate call."""
    async with grpc.aio.insecure_channel(server.addresses.grpc, options=_OPTIONS) as channel:
        call = RolloutStub(channel).Generate()  # type: ignore[arg-type]
        yield call
        call.cancel()


def open_requests() -> int:
    """How many requests the server has not got rid of."""
    return sum(getattr(task.get_coro(), "__name__", "") == "_answer" for task in asyncio.all_tasks())


def request(number: int, *, prompt_ids: list[int], num_samples: int = 1) -> pb.GenerateRequest:
    sampling = rollout_codec.sampling_to_wire(Sampling(max_new_tokens=50))
    return pb.GenerateRequest(
        request_id=number, prompt_ids=prompt_ids, num_samples=num_samples, sampling=sampling, deadline_ms=600_000
    )


async def test_samples_that_nobody_reads_end_their_stream_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply_stream, "_MAX_UNREAD_S", 3.0)
    ask = Ask(prompt_ids=prompt(4), sampling=Sampling(max_new_tokens=4), num_samples=2, seed=1, min_weight_version=0)
    async with (
        running_rollout() as server,
        server.client(job="other") as other,
        stream_that_nobody_reads(server) as call,
    ):
        for number in range(1, 9):
            await call.write(request(number, prompt_ids=[1, 2], num_samples=1000))
        async with asyncio.timeout(60):
            while open_requests() < 8:
                await server.queue()
        got = dict[int, Any]()
        await other.generate(ask, got.__setitem__, Deadline.after(30))
        assert len(got) == 2
        async with asyncio.timeout(60):
            while open_requests():
                await server.queue()
        await server.until(running=0)
        with pytest.raises(grpc.aio.AioRpcError, match="the client has not read a reply for 3 s") as ended:
            while True:
                await call.read()  # at last
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_refusals_that_nobody_reads_let_no_more_requests_in() -> None:
    async with running_rollout() as server, stream_that_nobody_reads(server) as call:
        with pytest.raises(TimeoutError):  # it cannot get rid of any more
            for number in range(1, 20_000):
                async with asyncio.timeout(2):
                    await call.write(request(number, prompt_ids=[61] * 1000))
        assert 0 < open_requests() < 1100
