"""The rollout servers of a job, all of the same model: what one of them loses, another samples."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import ModelMismatch, Unavailable
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.replicas import Replicas
from kdmesh.rpc.fleet.routing import RoutingPolicy
from kdmesh.rpc.fleet.server_fleet import ServerFleet
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts.client import Ask, RolloutClient
from kdmesh.types import RolloutDescription, Sample

log = logging.getLogger(__name__)

# One job has these servers for itself: what it has sent is all they have to do. How long an answer takes says little:
# it goes by the lengths of the responses.
_ROUTING = RoutingPolicy(choices=1000, slow_start_s=0, slow_factor=math.inf)
_SAME = ("architecture_fingerprint", "tokenizer_fingerprint", "vocabulary_size", "dtype")


class RolloutFleet(ServerFleet[RolloutClient]):
    """Belongs to one event loop.

    Args:
        discovery: where they are.
        job: name for the servers' metrics.
        architecture_fingerprint: the model that is wanted; empty takes the first server's.
        on_outdated: called when a server turns out to have older weights than `note_weights` was told.
    """

    def __init__(
        self,
        discovery: Discovery,
        *,
        job: str,
        architecture_fingerprint: str,
        on_outdated: Callable[[], None] = lambda: None,
        access: AccessConfig = OPEN_ACCESS,
    ) -> None:
        self._job = job
        self._access = access
        self._on_outdated = on_outdated
        self._newest = 0
        self._has_started = False
        self._model: RolloutDescription | None = None
        self._fingerprint = architecture_fingerprint
        self._too_narrow: dict[str, int] = {}  # tokens that servers, by their addresses, take too few of
        self._replicas = Replicas("rollout server", discovery, self._connect, routing=_ROUTING, joined=self._look_at)

    @property
    def model(self) -> RolloutDescription:
        """What every server serves; after `start`."""
        assert self._model is not None
        return self._model

    async def start(self, deadline: Deadline) -> None:
        """See ServerFleet."""
        await super().start(deadline)
        self._has_started = True

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the servers that are wanted now, serve the model, and are not left out."""
        return tuple(address for address in self._replicas.usable if address not in self._too_narrow)

    @property
    def outdated(self) -> frozenset[str]:
        """Addresses of connected servers that are known to have older weights than `note_weights` was told."""
        return frozenset(client.address for client in self._replicas.clients if client.weight_version < self._newest)

    async def note_weights(self, version: int, behind: Collection[str]) -> None:
        """Every server but those at the addresses `behind` serves this version now."""
        self._newest = version
        for client in self._replicas.clients:
            if client.address not in behind:
                client.weight_version = version
        self._replicas.notify()

    async def sample(self, ask: Ask, on_sample: Callable[[int, Sample], None], deadline: Deadline) -> None:
        """Give every sample to `on_sample` once, with its index, whichever server it comes from.

        Raises:
            DeadlineExpired: the last one did not come in time.
            ModelMismatch: every server that answers has older weights than the request wants, and nobody has noted
                that they serve newer ones. Otherwise they are waited for: somebody brings them.
            RpcError: the request is refused, or the engine failed on it.
        """
        missing = set(range(ask.num_samples))

        def is_new_enough(client: RolloutClient) -> bool:
            return client.weight_version >= ask.min_weight_version

        def may(client: RolloutClient) -> bool:
            return is_new_enough(client) or ask.min_weight_version > self._newest

        def arrive(index: int, sample: Sample) -> None:
            missing.remove(index)
            on_sample(index, sample)

        async def attempt(client: RolloutClient) -> None:
            try:
                await _sample_missing(client, ask, sorted(missing), arrive, deadline)
            except ModelMismatch as error:
                client.weight_version = min(client.weight_version, ask.min_weight_version - 1)
                self._look_at(client)
                # One that does not answer is not waited for: it would have old weights when it is back.
                if not any(is_new_enough(other) for other in self._replicas.clients) and may(client):
                    raise
                raise Unavailable(str(error), retry_after_s=0.0) from None
            except Unavailable:
                others = [other for other in self._replicas.clients if other is not client]
                if others and not any(is_new_enough(other) for other in others):
                    self._look_at(others[0])  # it was not needed before
                raise

        await self._replicas.somewhere(attempt, ask.num_tokens, deadline, may=may)

    async def _connect(self, address: str) -> RolloutClient:
        client = await RolloutClient.connect(
            address, job=self._job, architecture_fingerprint=self._fingerprint, access=self._access
        )
        try:
            self._admit(client)
        except (ModelMismatch, Unavailable):
            await client.close()
            raise
        return client

    def _look_at(self, client: RolloutClient) -> None:
        if client.weight_version < self._newest:
            self._on_outdated()

    def _admit(self, client: RolloutClient) -> None:
        """All must serve the same model; the narrowest limits at the start count, and later none may be narrower."""
        ours, theirs = self._model, client.model
        if ours is None:
            self._model, self._fingerprint = theirs, theirs.architecture_fingerprint
            return
        for name in _SAME:
            if getattr(ours, name) != getattr(theirs, name):
                raise ModelMismatch(
                    f"{client.address} has {name} {getattr(theirs, name)}, and the other rollout servers, or itself "
                    f"before, {getattr(ours, name)}; all rollout servers of a job must serve the same model"
                )
        if self._has_started:
            self._check_width(client.address, theirs.max_sequence_tokens, ours.max_sequence_tokens)
        self._model = replace(
            ours,
            max_sequence_tokens=min(ours.max_sequence_tokens, theirs.max_sequence_tokens),
            is_deterministic=ours.is_deterministic and theirs.is_deterministic,
        )

    def _check_width(self, address: str, tokens: int, begun: int) -> None:
        """It may come back as it was, so that it is not refused for ever."""
        was = self._too_narrow.pop(address, None)
        if tokens >= begun:
            return
        self._too_narrow[address] = tokens
        reason = f"takes prompts and responses of {tokens} tokens, and this job began with servers that take {begun}"
        if tokens != was:
            log.warning("a rollout server is left out", extra={"address": address, "reason": f"it {reason}"})
        raise Unavailable(f"it {reason}")


async def _sample_missing(
    client: RolloutClient,
    ask: Ask,
    missing: Sequence[int],
    on_sample: Callable[[int, Sample], None],
    deadline: Deadline,
) -> None:
    """One request for each run of neighbours, whose seeds are neighbours too."""

    async def sample(begin: int, count: int) -> None:
        seed = None if ask.seed is None else (ask.seed + begin) % 2**64
        part = replace(ask, num_samples=count, seed=seed)
        await client.generate(part, lambda index, sample: on_sample(begin + index, sample), deadline)

    try:
        async with asyncio.TaskGroup() as asking:
            for begin, count in _runs(missing):
                asking.create_task(sample(begin, count))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of neighbours in increasing indices."""
    begin = end = None
    for index in indices:
        if begin is None or index != end:
            if begin is not None and end is not None:
                yield begin, end - begin
            begin = index
        end = index + 1
    if begin is not None and end is not None:
        yield begin, end - begin
