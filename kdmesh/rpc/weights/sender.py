"""Brings new weights to all servers of a job that use its student, for a thread that blocks."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import DeadlineExpired, KdmeshError, RpcError
from kdmesh.groups.meeting import check_own_address
from kdmesh.handles.slab.runtime_dir import runtime_dir
from kdmesh.rpc.background_loop import BackgroundLoop
from kdmesh.rpc.retry import Deadline, RetryPolicy
from kdmesh.rpc.weights.delivery import Delivery
from kdmesh.rpc.weights.limits import Limits
from kdmesh.rpc.weights.link import WeightLink, describe_weights
from kdmesh.rpc.weights.offer import DoorOffer
from kdmesh.rpc.weights.progress import Progress, Update
from kdmesh.rpc.weights.services import ROLLOUTS, ServedWeights, WeightService
from kdmesh.tracing import spans
from kdmesh.weights.bucket_memory import BucketMemory, bucket_memory
from kdmesh.weights.buckets import MAX_BUCKET_BYTES, plan_buckets
from kdmesh.weights.doors import DoorChoice
from kdmesh.weights.manifest import Manifest, UpdatePolicy
from kdmesh.weights.packing import Changes, Packer, Weights

_BUFFERS = 3  # one is filled, one is copied by the servers, one waits for them
_ANSWER_S = 3.0  # a server that is there answers sooner
_SOCKET = "weights.sock"


Addresses = Sequence[str] | Callable[[], Collection[str]]


class WeightSender:
    """Sends whole versions. A context manager.

    A bucket is written to shared memory once, and every server of this node copies it from there; others get it
    through a group of two processes each, or inline.
    Servers copy one bucket while the next is filled. A server that dies, or is not there yet, is tried again until the
    deadline and then gets all of the version, whatever it missed.

    Raises, when made:
        ConfigError: there is not enough memory for the buckets, or their socket cannot be made, or `advertise` is no
            address of this machine.
    """

    def __init__(
        self,
        addresses: Addresses,
        *,
        service: WeightService = ROLLOUTS,
        job: str = "",
        bucket_bytes: int = MAX_BUCKET_BYTES,
        door: DoorChoice = "auto",
        advertise: str = "",
        device: torch.device | None = None,
        deadline_s: float = 600.0,
        bucket_s: float = 60.0,
        access: AccessConfig = OPEN_ACCESS,
    ) -> None:
        """
        Args:
            addresses: host:port of each server; at least one. Or what says where they are at any moment, where they
                come and go; it is called on the background loop.
            service: what kind of server they are.
            job: whose weights are sent; empty: unnamed.
            bucket_bytes: size of a bucket; three are held.
            door: how bytes travel; auto takes shared memory where a server can reach it, else a private group with
                each server, else messages.
            advertise: address of this machine by which servers reach a group; empty for that of the interface that
                leads to each.
            device: the GPU whose groups are NCCL's; None for gloo's.
            deadline_s: longest time for one version to reach all servers, their restarts included.
            bucket_s: how long a server may take for one bucket; past it, it costs the others no more time.
            access: how to get in, as an operator.
        """
        assert addresses
        if advertise:
            check_own_address(advertise)
        self._where: Callable[[], Collection[str]]
        if isinstance(addresses, Sequence):
            fixed = tuple(addresses)
            self._where = lambda: fixed
        else:
            self._where = addresses
        self._service = service
        self._job = job
        self._access = access
        self._bucket_bytes = bucket_bytes
        self._deadline_s = deadline_s
        self._policy = RetryPolicy()
        self._limits = Limits()
        self._closing = AsyncExitStack()
        self._base: bytes | None = None  # that all servers were left with
        self._progress: Progress | None = None  # of the version that is published now
        self._loop = BackgroundLoop()
        try:
            self._memory = self._loop.run(self._open)
        except BaseException:
            self._loop.close()
            raise
        self._offer = DoorOffer(
            memory=self._memory,
            choice=door,
            advertise=advertise,
            device=device or torch.device("cpu"),
            bucket_s=bucket_s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> tuple[ServedWeights, ...]:
        """What each server serves now, in the order of the addresses. Blocks until all have answered, or have gone.

        Raises:
            DeadlineExpired: one does not answer in time.
        """
        return self._loop.run(self._described, Deadline.after(self._deadline_s))

    def outdated(self, version: int, *, among: Collection[str] = ()) -> frozenset[str]:
        """Addresses of the servers, those `among` included, that answer now, and serve an older version.

        Blocks, shortly.
        """
        return self._loop.run(self._outdated, version, among)

    def publish(
        self,
        version: int,
        architecture_fingerprint: str,
        tensors: Weights,
        policy: UpdatePolicy = UpdatePolicy.FINISH,
        changes: Changes | None = None,
        *,
        to: Collection[str] | None = None,
        needed: int | None = None,
    ) -> frozenset[str]:
        """Return when `needed` servers serve this version, and the others have been tried once. Blocks.

        Tensors are made in this thread, one at a time and in order, and again from the first for servers that
        were not there the first time.

        Args:
            version: its number.
            architecture_fingerprint: of the model.
            tensors: all of the model's.
            policy: what becomes of samples under way.
            changes: to be added to `tensors`, which then are a base: it travels the first time, and to servers that
                turn out not to hold it.
            to: addresses of the servers that are to get it; None for all, those that come meanwhile included.
            needed: how many of them must serve it; None for all.

        Returns:
            The addresses of those that were left behind.

        Raises:
            DeadlineExpired: a server that is needed did not get it in time; the others serve it.
            ModelMismatch: a server has another model, or serves weights as new already; the others serve it.
            InvalidRequest: a server has other tensors, or found bytes changed on their way; the others serve it.
            ConfigError: a server cannot use the `door` that was asked for.
            NotFinite: a tensor is not; servers that had it not yet go on with their old weights.
        """
        adapter = None if changes is None else changes.adapter
        factors = () if changes is None else changes.factors

        def update(sent: Weights) -> Update:
            specs = tuple(spec for spec, _ in sent)
            return Update(
                Manifest(
                    version=version,
                    architecture_fingerprint=architecture_fingerprint,
                    tensors=specs,
                    policy=policy,
                    adapter=adapter,
                    job=self._job,
                ),
                sent,
            )

        is_known = adapter is not None and adapter.base == self._base
        short = update(factors) if is_known else None
        deadline = Deadline.after(self._deadline_s)
        self._progress = progress = Progress(update([*tensors, *factors]), short, to, deadline, needed=needed)
        while progress.is_unfinished:
            began_s = time.time()
            delivery = self._loop.run(self._begin, progress)
            try:
                self._send(delivery, progress.update, progress.deadline)
            finally:
                self._loop.run(delivery.close)
            progress.note(delivery.links)
            for link in delivery.links:
                facts = {"address": link.address, "door": link.door.value}
                spans.record("weights", begin_s=began_s, end_s=time.time(), is_taken=link.has_committed, **facts)
        self._progress = None
        left_behind = progress.report()
        self._base = None if adapter is None else adapter.base
        return left_behind

    def give_up(self) -> None:
        """Wait no more for servers that do not answer, or have not taken what is published now.

        Any thread; does not block.
        """
        self._loop.start(self._give_up)

    def close(self) -> None:
        """Give the memory back and end the thread."""
        if not self._loop.is_closed:
            self._loop.run(self._closing.aclose)
            self._loop.close()

    # In the caller's thread

    def _send(self, delivery: Delivery, update: Update, deadline: Deadline) -> None:
        """Where it fails, the links say why."""
        packer = Packer(update.tensors)
        for parts in plan_buckets([spec.size_bytes for spec, _ in update.tensors], self._bucket_bytes):
            buffer = self._loop.run(delivery.next_buffer, deadline)
            if buffer is None:
                return
            entries = packer.fill(self._memory.writable(buffer), parts)
            # Not waited for: the loop does it before whatever it is asked next.
            self._loop.start(delivery.hand_over, buffer, entries)
        self._loop.run(delivery.commit, update.manifest.version, deadline)

    # On the loop

    async def _open(self) -> BucketMemory:
        async with AsyncExitStack() as stack:
            directory = stack.enter_context(runtime_dir(None))
            memory = await stack.enter_async_context(
                bucket_memory(directory.path / _SOCKET, buffers=_BUFFERS, buffer_bytes=self._bucket_bytes)
            )
            self._closing = stack.pop_all()
        return memory

    async def _give_up(self) -> None:
        progress = self._progress  # the caller's thread may be done with it
        if progress is not None:
            progress.deadline = replace(progress.deadline, at_s=time.monotonic())
        self._limits.end()

    async def _begin(self, progress: Progress) -> Delivery:
        """To whoever can be reached; to nobody when the deadline has passed or nothing is left to do."""
        while progress.is_unfinished:
            if progress.attempts:
                wait_s = self._policy.wait_s(progress.attempts - 1)
                await asyncio.sleep(min(wait_s, progress.deadline.left_s))
            progress.begin_attempt(self._where())
            links = await asyncio.gather(*(self._try_link(progress, address) for address in tuple(progress.waiting)))
            if any(links):
                return Delivery([link for link in links if link is not None], self._memory, self._limits)
        return Delivery([], self._memory, self._limits)

    async def _try_link(self, progress: Progress, address: str) -> WeightLink | None:
        try:
            async with self._limits.of(min(progress.deadline.left_s, self._offer.bucket_s)):
                if address in progress.uncertain:
                    served = await describe_weights(address, self._service, self._access)
                    if served.version == progress.version:
                        progress.served(address)
                        return None
                manifest = progress.update.manifest
                return await WeightLink.open(address, self._service, manifest, self._offer, access=self._access)
        except TimeoutError:
            progress.failed(address, DeadlineExpired("no answer"))
        except KdmeshError as error:
            progress.failed(address, error)
        return None

    async def _outdated(self, version: int, among: Collection[str]) -> frozenset[str]:
        async def is_outdated(address: str) -> bool:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    return (await describe_weights(address, self._service, self._access)).version < version
            except (RpcError, TimeoutError):
                return False

        asked = tuple(dict.fromkeys((*self._where(), *among)))
        found = await asyncio.gather(*(is_outdated(address) for address in asked))
        return frozenset(address for address, is_old in zip(asked, found, strict=True) if is_old)

    async def _described(self, deadline: Deadline) -> tuple[ServedWeights, ...]:
        try:
            async with self._limits.of(deadline.left_s):
                return await self._describe(deadline)
        except TimeoutError:
            raise DeadlineExpired(f"{', '.join(self._where()) or 'no server'} did not answer in time") from None

    async def _describe(self, deadline: Deadline) -> tuple[ServedWeights, ...]:
        for attempt in itertools.count():
            described = await asyncio.gather(*(self._describe_one(address, deadline) for address in self._where()))
            if served := tuple(one for one in described if one is not None):
                return served
            await self._pause(attempt, deadline, "all servers have gone, and none came")
        raise AssertionError("count ends")

    async def _describe_one(self, address: str, deadline: Deadline) -> ServedWeights | None:
        """None for a server that has gone."""
        for attempt in itertools.count():
            try:
                return await describe_weights(address, self._service, self._access)
            except RpcError as error:
                if address not in self._where():
                    return None
                await self._pause(attempt, deadline, f"{address} did not answer", error)
        raise AssertionError("count ends")

    async def _pause(self, attempt: int, deadline: Deadline, what: str, why: RpcError | None = None) -> None:
        """Before the next attempt. Raises DeadlineExpired where there is no time for one."""
        wait_s = self._policy.wait_s(attempt)
        if wait_s > deadline.left_s:
            reason = "" if why is None else f": {why}"
            raise DeadlineExpired(f"{what} within {deadline.total_s} s{reason}") from None
        await asyncio.sleep(wait_s)
