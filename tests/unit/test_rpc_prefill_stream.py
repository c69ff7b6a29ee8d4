"""Answers of a Prefill stream find who asked, or are given back."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from kdmesh.errors import RpcError
from kdmesh.rpc.teachers.prefill_stream import PrefillStream
from kdmesh.types import TokenSequence
from kdmesh.v1 import common_pb2
from kdmesh.v1 import teacher_pb2 as pb

SEQUENCE = TokenSequence(token_ids=np.arange(4, dtype=np.int32), positions=np.array([1], dtype=np.int32))


class Call:
    """Stands for a gRPC stream: replies are what the test puts in."""

    def __init__(self) -> None:
        self.replies: asyncio.Queue[pb.PrefillReply] = asyncio.Queue()

    async def write(self, request: pb.PrefillRequest) -> None:
        pass

    async def __aiter__(self) -> Any:
        while True:
            yield await self.replies.get()

    def cancel(self) -> None:
        pass


class Stub:
    """A teacher's stub with one stream."""

    def __init__(self) -> None:
        self.call = Call()

    def Prefill(self) -> Call:
        return self.call


def reply(request_id: int) -> pb.PrefillReply:
    return pb.PrefillReply(request_id=request_id, result=pb.PrefillResult(rows=common_pb2.Handle(segment=7)))


async def started(stub: Stub, orphans: list[int]) -> tuple[PrefillStream, asyncio.Task[pb.PrefillResult]]:
    """A stream, and a task that waits for the answer to its first request."""
    ended: list[RpcError] = []
    stream = PrefillStream(
        stub,  # type: ignore[arg-type]
        "here:1",
        on_orphan=lambda handle: orphans.append(handle.segment),
        on_load=lambda load: None,
        on_end=ended.append,
    )
    asked = asyncio.create_task(stream.ask(b"s", [SEQUENCE], model_fingerprint="", deadline_s=1))
    await asyncio.sleep(0)
    return stream, asked


async def test_answer_reaches_who_asked() -> None:
    stub, orphans = Stub(), list[int]()
    stream, asked = await started(stub, orphans)
    stub.call.replies.put_nowait(reply(1))
    assert (await asked).rows.segment == 7
    assert orphans == []
    await stream.close()


async def test_answer_that_nobody_waits_for_is_given_back() -> None:
    stub, orphans = Stub(), list[int]()
    stream, asked = await started(stub, orphans)
    asked.cancel()
    await asyncio.wait((asked,))
    stream._take(reply(1))
    assert orphans == [7]
    await stream.close()


async def test_answer_in_the_very_moment_of_cancellation_is_given_back() -> None:
    stub, orphans = Stub(), list[int]()
    stream, asked = await started(stub, orphans)
    stream._take(reply(1))  # what the reader does; who asked has not run since
    asked.cancel()
    await asyncio.wait((asked,))
    assert asked.cancelled()
    assert orphans == [7]
    await stream.close()
