"""Sends each request to the replica with the least to do, and elsewhere when that one fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from kdmesh.errors import DeadlineExpired, HandleGone, ModelMismatch, Unavailable
from kdmesh.losses.head import OutputHead
from kdmesh.rpc.background_tasks import BackgroundTasks
from kdmesh.rpc.doors import DoorChoice
from kdmesh.rpc.replica import Replica
from kdmesh.rpc.retry import Deadline, RetryPolicy
from kdmesh.rpc.teacher_client import TeacherClient, TeacherRows
from kdmesh.types import ModelDescription, TokenSequence

log = logging.getLogger(__name__)

T = TypeVar("T")


class Fleet:
    """Replicas of one model. Belongs to one event loop.

    Attributes:
        retries: requests that were sent once more.
    """

    def __init__(self, addresses: Sequence[str], *, job: str, door: DoorChoice, model_fingerprint: str) -> None:
        self.retries = 0
        self._job = job
        self._door: DoorChoice = door
        self._model: ModelDescription | None = None
        self._fingerprint = model_fingerprint
        self._changed = asyncio.Event()
        self._tasks = BackgroundTasks()
        self._policy = RetryPolicy()
        self._replicas = [self._replica(address) for address in addresses]

    @property
    def model(self) -> ModelDescription:
        """What every replica serves; after `start`."""
        assert self._model is not None
        return self._model

    @property
    def doors(self) -> frozenset[str]:
        """Names of the doors in use now."""
        return frozenset(r.client.door.name for r in self._replicas if r.client is not None)

    async def start(self, deadline: Deadline) -> None:
        """Connect. Returns when every replica has been tried and one answers.

        Raises:
            ConfigError, ModelMismatch: a replica that answers is of no use.
            DeadlineExpired: none answers.
        """
        for replica in self._replicas:
            self._tasks.start(replica.run())
        await self._until(deadline, self._is_started)

    async def close(self) -> None:
        """Close every session."""
        await self._tasks.close()

    async def ask(self, sequences: Sequence[TokenSequence], deadline: Deadline) -> TeacherRows:
        """The rows of a request that the model's limits allow; the same whichever replica answers.

        Raises:
            DeadlineExpired: no replica answered in time.
            RpcError: the request is refused, or the engine failed on it.
        """

        async def prefill(client: TeacherClient) -> TeacherRows:
            return self._same_version(await client.prefill(sequences, deadline))

        return await self._somewhere(prefill, sum(sequence.num_tokens for sequence in sequences), deadline)

    async def head(self, deadline: Deadline) -> tuple[OutputHead, int]:
        """The output head and its weight version. Raises as `ask`."""
        return await self._somewhere(TeacherClient.head, 0, deadline)

    async def _somewhere(self, call: Callable[[TeacherClient], Awaitable[T]], num_tokens: int, deadline: Deadline) -> T:
        """What `call` returns for one replica, or the next when that one fails, until the deadline."""
        for attempt in itertools.count():
            replica = await self._choose(deadline)
            assert replica.client is not None
            try:
                with replica.busy(num_tokens):
                    async with asyncio.timeout(deadline.left_s):
                        return await call(replica.client)
            except TimeoutError:
                raise self._late(deadline, f"{replica.address} has not answered") from None
            except (Unavailable, HandleGone) as error:
                replica.last_error = error
                asked_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
                replica.rest(self._policy.wait_s(attempt, at_least_s=asked_s))
                self.retries += 1
        raise AssertionError("unreachable")

    def _replica(self, address: str) -> Replica:
        async def connect() -> TeacherClient:
            client = await TeacherClient.connect(
                address, job=self._job, door=self._door, model_fingerprint=self._fingerprint
            )
            try:
                self._admit(client)
            except ModelMismatch:
                await client.close()
                raise
            return client

        return Replica(address, connect, self._changed.set)

    def _admit(self, client: TeacherClient) -> None:
        """All replicas must serve the same; the narrowest limits count."""
        ours, theirs = self._model, client.model
        if ours is None:
            self._model, self._fingerprint = theirs, theirs.model_fingerprint
            return
        limits = {
            name: min(getattr(ours, name), getattr(theirs, name))
            for name in ("max_sequence_tokens", "max_request_tokens", "max_request_rows")
        }
        for name in ("model_fingerprint", "tokenizer_fingerprint", "weight_version", "hidden_size", "dtype", "head"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ModelMismatch(
                    f"{client.address} has {name} {getattr(theirs, name)}, and the other teachers, or itself "
                    f"before, {getattr(ours, name)}; all teachers of a job must serve the same model"
                )
        self._model = replace(ours, **limits)

    def _same_version(self, rows: TeacherRows) -> TeacherRows:
        if rows.weight_version != self.model.weight_version:
            raise ModelMismatch(
                f"the teacher answered with weight version {rows.weight_version}; this job began with "
                f"{self.model.weight_version}"
            )
        return rows

    def _is_started(self) -> bool:
        failures = [r.failure for r in self._replicas if r.failure is not None]
        if failures:
            raise failures[0]
        return all(r.has_tried for r in self._replicas) and any(r.client is not None for r in self._replicas)

    async def _choose(self, deadline: Deadline) -> Replica:
        """The free replica with the fewest outstanding tokens; waits for one."""
        chosen: list[Replica] = []

        def is_chosen() -> bool:
            if all(r.failure is not None for r in self._replicas):
                raise next(r.failure for r in self._replicas if r.failure is not None)
            free = [r for r in self._replicas if r.free_in_s == 0]
            chosen[:] = sorted(free, key=lambda r: r.outstanding_tokens)[:1]
            return bool(chosen)

        await self._until(deadline, is_chosen)
        return chosen[0]

    async def _until(self, deadline: Deadline, is_so: Callable[[], bool]) -> None:
        """Return when `is_so`, which is asked again after every change of a replica.

        Raises:
            DeadlineExpired: it was not so in time.
        """
        while not is_so():
            if not deadline.left_s:
                raise self._late(deadline, "no teacher is ready")
            rest_s = min(r.free_in_s for r in self._replicas)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(deadline.left_s, rest_s)):
                    await self._changed.wait()

    def _late(self, deadline: Deadline, what: str) -> DeadlineExpired:
        reasons = "; ".join(f"{r.address}: {r.last_error}" for r in self._replicas if r.last_error is not None)
        return DeadlineExpired(f"{what} within {deadline.total_s:g} s{f' ({reasons})' if reasons else ''}")
