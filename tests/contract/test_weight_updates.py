"""A server takes an update step by step, and whatever is wrong with one leaves it as it was."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from kdmesh.errors import Unavailable
from kdmesh.rpc import codec
from kdmesh.rpc.channel import open_channel
from kdmesh.rpc.weights import codec as weight_codec
from kdmesh.rpc.weights.updates import WeightUpdates
from kdmesh.types import DType, Handle
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.v1.rollout_pb2_grpc import RolloutStub
from kdmesh.weights.bucket_memory import BucketMemory, bucket_memory
from kdmesh.weights.buckets import plan_buckets
from kdmesh.weights.manifest import Manifest
from kdmesh.weights.packing import Packer
from tests.support.handles_consumer import until
from tests.support.weight_server import weight_server
from tests.support.weight_targets import MemoryTarget, is_same, manifest_of, random_weights

WEIGHTS = random_weights({"embedding": (70, 30), "norm": (33,)}, seed=0)
SPECS = list(WEIGHTS)
BUCKET_BYTES = 4096
Step = pb.UpdateWeightsRequest


class _Call:
    """One stream, a step at a time."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._call = RolloutStub(self._channel).UpdateWeights()

    async def ask(self, step: Step) -> pb.UpdateWeightsReply:
        """The reply. Raises how the call ended instead."""
        await self._call.write(step)
        reply = await self._call.read()
        assert isinstance(reply, pb.UpdateWeightsReply)
        return reply

    async def done_asking(self) -> grpc.StatusCode:
        """How a stream ends that says no more."""
        await self._call.done_writing()
        return await self._call.code()

    async def close(self) -> None:
        """Break it."""
        self._call.cancel()
        await self._channel.close()


@asynccontextmanager
async def _call(address: str) -> AsyncIterator[_Call]:
    call = _Call(address)
    try:
        yield call
    finally:
        await call.close()


def _begin(*, version: int = 1, memory: BucketMemory | None = None) -> Step:
    begin = weight_codec.manifest_to_wire(manifest_of(SPECS, version=version))
    if memory is not None:
        begin.broker_socket, begin.session, begin.node_nonce = str(memory.socket_path), memory.session, memory.nonce
        begin.doors.append(pb.WEIGHT_DOOR_SHARED_MEMORY)
    return Step(begin=begin)


def _buckets() -> list[Step]:
    packer = Packer([(spec, lambda tensor=tensor: tensor) for spec, tensor in WEIGHTS.items()])  # type: ignore[misc]
    steps = []
    for parts in plan_buckets([spec.size_bytes for spec in SPECS], BUCKET_BYTES):
        bucket = bytearray(parts[-1].end_bytes)
        entries = weight_codec.entries_to_wire(packer.fill(memoryview(bucket), parts))
        steps.append(Step(bucket=pb.WeightBucket(entries=entries, inline=bytes(bucket))))
    return steps


COMMIT = Step(commit=pb.CommitUpdate())


async def _answered(updates: WeightUpdates, requests: AsyncIterator[Step]) -> None:
    async for _ in updates.answer(requests):
        pass


async def _update(address: str, version: int) -> None:
    async with _call(address) as call:
        for step in [_begin(version=version), *_buckets()]:
            assert (await call.ask(step)).weight_version < version
        assert (await call.ask(COMMIT)).weight_version == version


def _without_bytes(step: Step) -> Step:
    return Step(bucket=pb.WeightBucket(entries=step.bucket.entries))


def _too_long(step: Step) -> Step:
    octets = step.bucket.inline.ljust(2**20 + 1, b"0")
    return Step(bucket=pb.WeightBucket(entries=step.bucket.entries, inline=octets))


def _by_handle(step: Step) -> Step:
    handle = Handle(segment=0, epoch=1, token=bytes(16), offset_bytes=0, rows=1, cols=1024, dtype=DType.FLOAT32)
    return Step(bucket=pb.WeightBucket(entries=step.bucket.entries, handle=codec.handle_to_wire(handle)))


def _short_digest(step: Step) -> Step:
    wrong = Step()
    wrong.CopyFrom(step)
    wrong.bucket.entries[0].digest = b"123"
    return wrong


FIRST, SECOND = _buckets()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([FIRST], "says bucket where begin comes next"),
        ([COMMIT], "says commit where begin comes next"),
        ([Step()], "says nothing where begin comes next"),
        ([_begin(), _begin()], "says begin where join or bucket or commit comes next"),
        ([_begin(), COMMIT], "bytes of embedding, norm"),
        ([_begin(), FIRST, COMMIT], "embedding, norm (2 in all) have not come"),
        ([_begin(), SECOND], "parts come in order"),
        ([_begin(), FIRST, FIRST], "parts come in order"),
        ([_begin(), _without_bytes(FIRST)], "a bucket without bytes"),
        ([_begin(), _too_long(FIRST)], "1048577 bytes inline; at most 1048576"),
        ([_begin(), _by_handle(FIRST)], "send it inline"),
        ([_begin(), _short_digest(FIRST)], "a digest of 3 bytes"),
    ],
)
async def test_a_step_that_is_wrong_ends_the_update(steps: list[Step], message: str) -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _):
        async with _call(address) as call:
            for step in steps[:-1]:
                await call.ask(step)
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT") as caught:
                await call.ask(steps[-1])
            assert message in str(caught.value.details())
        assert target.staged is None and target.version == 0
        await _update(address, 1)
        assert all(is_same(target.served[spec.name], tensor) for spec, tensor in WEIGHTS.items())


async def test_an_update_without_a_policy_is_refused() -> None:
    async with weight_server(MemoryTarget(SPECS)) as (address, _), _call(address) as call:
        begin = _begin()
        begin.begin.policy = pb.UPDATE_POLICY_UNSPECIFIED
        with pytest.raises(grpc.aio.AioRpcError, match="unknown update policy 0"):
            await call.ask(begin)


async def test_a_stream_that_ends_without_commit_changes_nothing() -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _):
        async with _call(address) as call:
            for step in [_begin(), FIRST, SECOND]:
                await call.ask(step)
            assert await call.done_asking() is grpc.StatusCode.INVALID_ARGUMENT
        assert target.staged is None and target.served == {}


async def test_a_stream_that_breaks_changes_nothing_and_the_next_update_may_begin() -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _):
        async with _call(address) as call:
            for step in [_begin(version=5), FIRST, SECOND]:
                await call.ask(step)
        await until(lambda: target.staged is None)
        await _update(address, 2)
        assert target.version == 2


async def test_a_second_update_waits_for_its_turn() -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _):
        async with _call(address) as first, _call(address) as second:
            for step in [_begin(version=2), FIRST]:
                await first.ask(step)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE") as caught:
                await second.ask(_begin(version=3))
            assert "update to version 2 is under way" in str(caught.value.details())
            for step in [SECOND, COMMIT]:
                await first.ask(step)
        assert target.version == 2


async def test_a_sender_that_falls_silent_is_not_waited_for() -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target, silence_s=0.1) as (address, _):
        async with _call(address) as call:
            await call.ask(_begin())
            with pytest.raises(grpc.aio.AioRpcError, match=r"nothing came for 0\.1 s"):
                await call._call.read()
        assert target.staged is None


async def test_a_stream_that_breaks_while_samples_are_finished_is_not_committed() -> None:
    target = MemoryTarget(SPECS)
    is_waiting, is_withdrawn = asyncio.Event(), asyncio.Event()

    async def apply(manifest: Manifest, commit: Callable[[], None]) -> None:
        is_waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            with pytest.raises(Unavailable, match="withdrawn"):
                commit()
            is_withdrawn.set()
            raise

    async with weight_server(target, apply=apply) as (address, updates):
        async with _call(address) as call:
            for step in [_begin(), FIRST, SECOND]:
                await call.ask(step)
            await call._call.write(COMMIT)
            await is_waiting.wait()
        await is_withdrawn.wait()
        await until(lambda: target.staged is None)
        assert (updates.version, target.version) == (0, 0)


async def test_a_commit_that_has_begun_is_finished_although_nobody_waits() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    class _Slow(MemoryTarget):
        def commit(self, version: int) -> None:
            has_begun.set()
            may_end.wait()
            super().commit(version)

    target = _Slow(SPECS)
    async with weight_server(target) as (address, updates):
        async with _call(address) as call:
            for step in [_begin(), FIRST, SECOND]:
                await call.ask(step)
            await call._call.write(COMMIT)
            await asyncio.to_thread(has_begun.wait)
        await asyncio.sleep(0.02)
        may_end.set()
        await until(lambda: updates.updated_at_s is not None)
        assert updates.version == 1
        await _update(address, 2)
        assert target.version == 2


async def test_a_target_that_starts_over_waits_for_the_end_of_an_update_whose_stream_is_gone() -> None:
    is_copying, may_end = threading.Event(), threading.Event()

    class _Slow(MemoryTarget):
        def write(self, place: int, offset_bytes: int, data: memoryview) -> None:
            is_copying.set()
            may_end.wait()
            super().write(place, offset_bytes, data)

    async def requests() -> AsyncIterator[Step]:
        yield _begin()
        yield FIRST

    target = _Slow(SPECS)
    async with weight_server(target) as (address, updates):
        answering = asyncio.create_task(_answered(updates, requests()))
        await asyncio.to_thread(is_copying.wait)
        while not answering.done():  # once ends the copying, again the waiting for its end
            answering.cancel()
            await asyncio.sleep(0)
        starting_over = asyncio.create_task(updates.start_over())
        await asyncio.sleep(0.02)
        may_end.set()
        await starting_over
        assert target.staged is None and updates.version == 0
        await _update(address, 1)


async def test_an_update_that_was_committed_is_ended_before_the_next_begins() -> None:
    has_committed, may_end = asyncio.Event(), asyncio.Event()

    async def apply(manifest: Manifest, commit: Callable[[], None]) -> None:
        await asyncio.to_thread(commit)
        has_committed.set()
        await may_end.wait()  # as a teacher copies its new head

    async with weight_server(MemoryTarget(SPECS), apply=apply) as (address, _), _call(address) as call:
        for step in [_begin(), FIRST, SECOND]:
            await call.ask(step)
        committing = asyncio.create_task(call.ask(COMMIT))
        await has_committed.wait()
        async with _call(address) as early:
            with pytest.raises(grpc.aio.AioRpcError, match="the update to version 1 is under way"):
                await early.ask(_begin(version=2))
        may_end.set()
        assert (await committing).weight_version == 1
        await _update(address, 2)


async def test_an_engine_that_fails_to_commit_keeps_its_weights() -> None:
    class _Failing(MemoryTarget):
        def commit(self, version: int) -> None:
            if version == 1:
                raise RuntimeError("no")
            super().commit(version)

    target = _Failing(SPECS)
    async with weight_server(target) as (address, updates):
        async with _call(address) as call:
            for step in [_begin(), FIRST, SECOND]:
                await call.ask(step)
            with pytest.raises(grpc.aio.AioRpcError, match="INTERNAL"):
                await call.ask(COMMIT)
        assert updates.version == 0 and target.staged is None
        await _update(address, 2)


# Shared memory


def _offered(memory: BucketMemory, step: Step, *, size_bytes: int | None = None) -> Step:
    """The same bucket in buffer 0."""
    octets = step.bucket.inline
    memory.writable(0)[: len(octets)] = octets
    handle = codec.handle_to_wire(memory.offer(0, size_bytes or len(octets)))
    return Step(bucket=pb.WeightBucket(entries=step.bucket.entries, handle=handle))


@asynccontextmanager
async def _memory(tmp_path: Path) -> AsyncIterator[BucketMemory]:
    async with bucket_memory(tmp_path / "weights.sock", buffers=1, buffer_bytes=BUCKET_BYTES) as memory:
        yield memory


async def test_buckets_in_shared_memory_are_copied_when_they_are_answered(tmp_path: Path) -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _), _memory(tmp_path) as memory, _call(address) as call:
        assert (await call.ask(_begin(memory=memory))).door == pb.WEIGHT_DOOR_SHARED_MEMORY
        for step in (FIRST, SECOND):  # in the same buffer
            await call.ask(_offered(memory, step))
        await call.ask(COMMIT)
        assert all(is_same(target.served[spec.name], tensor) for spec, tensor in WEIGHTS.items())


async def test_a_bucket_larger_than_its_memory_is_the_senders_fault(tmp_path: Path) -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _), _memory(tmp_path) as memory:
        async with _call(address) as call:
            await call.ask(_begin(memory=memory))
            with pytest.raises(grpc.aio.AioRpcError, match=r"INVALID_ARGUMENT[\s\S]*do not fit in its 4096 bytes"):
                await call.ask(_offered(memory, FIRST, size_bytes=BUCKET_BYTES + 4))
        assert target.staged is None
        await _update(address, 1)


async def test_a_handle_that_has_ended_is_gone(tmp_path: Path) -> None:
    async with weight_server(MemoryTarget(SPECS)) as (address, _), _memory(tmp_path) as memory, _call(address) as call:
        await call.ask(_begin(memory=memory))
        stale = _offered(memory, FIRST)
        memory.offer(0, BUCKET_BYTES)
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await call.ask(stale)


async def test_another_senders_memory_is_not_read(tmp_path: Path) -> None:
    async with weight_server(MemoryTarget(SPECS)) as (address, _), _memory(tmp_path) as memory, _call(address) as call:
        begin = _begin(memory=memory)
        begin.begin.node_nonce = bytes(16)
        assert (await call.ask(begin)).door == pb.WEIGHT_DOOR_INLINE


async def test_a_session_that_is_none_is_gone(tmp_path: Path) -> None:
    target = MemoryTarget(SPECS)
    async with weight_server(target) as (address, _), _memory(tmp_path) as memory:
        async with _call(address) as call:
            begin = _begin(memory=memory)
            begin.begin.session = bytes(16)
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await call.ask(begin)
        await _update(address, 1)
