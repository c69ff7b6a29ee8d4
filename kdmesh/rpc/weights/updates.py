"""The server's side of UpdateWeights."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TypeAlias, TypeVar

import torch

from kdmesh.errors import InvalidRequest, Unavailable, Withdrawn
from kdmesh.rpc.caller import caller_name
from kdmesh.rpc.weights import codec as weight_codec
from kdmesh.rpc.weights.source import BucketSource
from kdmesh.tracing import spans
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.weights.manifest import Manifest, UpdatePolicy
from kdmesh.weights.target import WeightTarget
from kdmesh.weights.versions import UpdateState, WeightVersions

log = logging.getLogger(__name__)

T = TypeVar("T")

Apply: TypeAlias = Callable[[Manifest, Callable[[], None]], Awaitable[None]]
"""Awaited with what was verified and a blocking `commit`: does what manifest.policy says with the samples under way,
and calls `commit` once, in the engine's thread, when no decoding step is running. It may be cancelled before that."""


class WeightUpdates:
    """Takes one update at a time; belongs to one event loop.

    Bytes are copied and checked in a thread of its own, so that sampling, keep-alives and other calls go on.
    """

    def __init__(
        self,
        target: WeightTarget,
        *,
        architecture_fingerprint: str,
        apply: Apply,
        version: int = 0,
        policies: Collection[UpdatePolicy] = tuple(UpdatePolicy),
        silence_s: float = 300.0,
        device: torch.device | None = None,
        admit: Callable[[str], None] = lambda job: None,
        taken: Callable[[str], None] = lambda job: None,
    ) -> None:
        """
        Args:
            target: the engine.
            architecture_fingerprint: of its model.
            apply: see Apply.
            version: of the weights the server was started with.
            policies: those that `apply` knows.
            silence_s: how long a sender may say nothing before its update is dropped.
            admit: raises an RpcError when the job of this name may not update the weights.
            taken: called in the engine's thread when the weights of the job of this name are served.
            device: a GPU that this process computes on, to which bytes may come over NCCL; None where it has none.
        """
        self._versions = WeightVersions(target, architecture_fingerprint=architecture_fingerprint, version=version)
        self._apply = apply
        self._policies = policies
        self._silence_s = silence_s
        self._device = device
        self._admit = admit
        self._taken = taken
        self.updated_at_s: float | None = None
        """When the weights that are served came, in Unix time; None: they are those of the start."""

        self._receiving: Manifest | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")

    @property
    def version(self) -> int:
        """Of the weights that are served."""
        return self._versions.version

    @property
    def state(self) -> UpdateState:
        """What is being done about new weights."""
        return self._versions.state

    async def start_over(self) -> None:
        """The target has the weights of the start again; no update is being received."""
        await self._run(self._versions.start_over)  # behind the end of an update whose stream is gone
        self.updated_at_s = None

    def close(self) -> None:
        """End the thread. Blocks for a copy under way; call it when no update is answered any more."""
        self._thread.shutdown()

    async def answer(
        self, requests: AsyncIterator[pb.UpdateWeightsRequest]
    ) -> AsyncGenerator[pb.UpdateWeightsReply, None]:
        """The replies to one UpdateWeights stream. However it ends: without a commit, nothing has changed.

        Raises:
            RpcError: as the service's proto file says.
        """
        begin = await self._next(requests, "begin")
        manifest = weight_codec.manifest_from_wire(begin.begin)
        if manifest.policy not in self._policies:
            raise InvalidRequest(f"update policy {manifest.policy}; this server knows {', '.join(self._policies)}")
        job = caller_name() or manifest.job
        self._admit(job)
        if self._receiving is not None:  # until its very end: what ends it must not meet another's beginning
            raise Unavailable(f"the update to version {self._receiving.version} is under way")
        self._versions.admit(manifest)
        self._receiving = manifest
        try:
            with spans.span("weight update", parent=begin.begin.traceparent, job=job, version=manifest.version):
                async with aclosing(self._receive(begin.begin, requests, job)) as replies:
                    async for reply in replies:
                        yield reply
        finally:
            self._receiving = None
        log.info("weights replaced", extra={"version": self.version, "policy": manifest.policy.value})
        yield pb.UpdateWeightsReply(weight_version=self.version)

    async def _receive(
        self, begin: pb.BeginUpdate, requests: AsyncIterator[pb.UpdateWeightsRequest], job: str
    ) -> AsyncGenerator[pb.UpdateWeightsReply, None]:
        """The replies to all steps but the last; then it is committed."""
        began_s = time.time()
        source: BucketSource | None = None
        try:
            await self._run(self._versions.begin)
            source = await BucketSource.open(begin, device=self._device, silence_s=self._silence_s)
            yield self._took(source)
            while not (request := await self._next(requests, "join", "bucket", "commit")).HasField("commit"):
                if request.HasField("join"):
                    await source.join(request.join)
                    yield self._took(source)
                    continue
                entries = weight_codec.entries_from_wire(request.bucket.entries)
                # Released at once, although an error's frames may refer to it: it is the sender's memory.
                with await source.read(request.bucket) as data:
                    await self._run(self._versions.write, entries, data)
                yield pb.UpdateWeightsReply(weight_version=self.version)
            spans.record("receive", begin_s=began_s, end_s=time.time(), door=source.door.value)
            verified = await self._run(self._versions.verify)
            with spans.span("commit"):
                await self._commit(verified, job)
        finally:
            # In the thread, behind whatever it still does, so nothing is written after it. When cancelled, not awaited.
            ending = asyncio.wrap_future(self._thread.submit(self._versions.discard))
            if source is not None:
                await source.close()
            await asyncio.shield(ending)

    def _took(self, source: BucketSource) -> pb.UpdateWeightsReply:
        return pb.UpdateWeightsReply(weight_version=self.version, door=weight_codec.DOORS.to_wire(source.door))

    async def _next(self, requests: AsyncIterator[pb.UpdateWeightsRequest], *wanted: str) -> pb.UpdateWeightsRequest:
        try:
            async with asyncio.timeout(self._silence_s):
                request = await anext(requests)
        except StopAsyncIteration:
            raise InvalidRequest(f"the stream ended where {' or '.join(wanted)} comes next") from None
        except TimeoutError:
            raise Unavailable(f"nothing came for {self._silence_s} s; the update was dropped") from None
        step = request.WhichOneof("step")
        if step not in wanted:
            raise InvalidRequest(f"the update says {step or 'nothing'} where {' or '.join(wanted)} comes next")
        return request

    async def _commit(self, manifest: Manifest, job: str) -> None:
        """Apply it; when cancelled, not at all unless it has begun."""
        turn = _Turn(partial(self._take_over, job))
        applying = asyncio.ensure_future(self._apply(manifest, turn.take))
        try:
            await asyncio.shield(applying)
        except asyncio.CancelledError:
            if turn.withdraw():
                applying.cancel()
            await asyncio.wait([applying])
            raise

    def _take_over(self, job: str) -> None:
        """In the engine's thread."""
        self._versions.commit()
        self.updated_at_s = time.time()
        self._taken(job)

    async def _run(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)


class _Turn:
    """A call that is made or withdrawn, never both."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._is_taken = False

    def take(self) -> None:
        """Make the call. Raises Withdrawn when it may not be made any more."""
        if not self._decide():
            raise Withdrawn("the update was withdrawn")
        self._call()

    def withdraw(self) -> bool:
        """Whether the call is never made."""
        return self._decide()

    def _decide(self) -> bool:
        with self._lock:
            is_first, self._is_taken = not self._is_taken, True
        return is_first
