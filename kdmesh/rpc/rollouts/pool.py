"""All rollout servers of a job, for a thread that blocks."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.rpc.fleet.discovery import Discovery
from kdmesh.rpc.fleet.server_pool import ServerPool
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts.client import Ask
from kdmesh.rpc.rollouts.fleet import RolloutFleet
from kdmesh.rpc.rollouts.pending_samples import PendingSamples
from kdmesh.types import Int32Array, PlacedImage, RolloutDescription, Sample, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """What a pool has done since it was opened."""

    samples: int  # that came
    retries: int  # requests that were sent once more, for the samples that were missing


class RolloutPool(ServerPool[RolloutFleet]):
    """Asks for samples ahead of their use; one background thread does the rest. A context manager.

    Requests go to the server with the fewest outstanding tokens. When a server dies, the samples that it still owed
    are sampled by another one, or by itself when it is back; those that have come are kept, so none is used twice.
    Nothing is retried past the deadline. A server that came back has old weights: `wait` tells whoever brings the new.

    Raises, when opened:
        DeadlineExpired: no server answers within `connect_s`.
        Unauthenticated, PermissionDenied: a server does not let this job in.
        ConfigError: `access` cannot be used.
        ModelMismatch: the servers serve different models, or another than `architecture_fingerprint`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        job: str,
        deadline_s: float = 600.0,
        requests_ahead: int = 0,
        architecture_fingerprint: str = "",
        access: AccessConfig = OPEN_ACCESS,
        connect_s: float | None = None,
    ) -> None:
        """Connect. Blocks until a server is ready.

        Args:
            addresses: of the servers of one model, as Discovery takes them; at least one.
            job: name for the metrics of servers that ask nobody who they are.
            deadline_s: longest wait for the last sample of a request, retries and a server's restart included.
            requests_ahead: how many requests this caller lets wait for one: each has `deadline_s` as well.
            architecture_fingerprint: the model that is wanted; empty takes the first server's.
            access: how to get in.
            connect_s: longest wait for the first server; None: as long as for a request.
        """
        assert addresses
        self._sample_s = deadline_s * (requests_ahead + 1)
        self._samples = 0
        self._outdated: concurrent.futures.Future[None] = concurrent.futures.Future()
        super().__init__(
            lambda: RolloutFleet(
                Discovery(addresses),
                job=job,
                architecture_fingerprint=architecture_fingerprint,
                on_outdated=self._tell_outdated,
                access=access,
            ),
            deadline_s=deadline_s,
            connect_s=connect_s,
        )

    def describe(self) -> RolloutDescription:
        """The model that every server serves; limits are those of the narrowest.

        Its weight_version is that of the first server when it was connected: later ones are in the samples.
        """
        return self._fleet.model

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int | None,
        min_weight_version: int = 0,
        images: tuple[PlacedImage, ...] = (),
        on_sample: Callable[[Sample], None] = lambda sample: None,
    ) -> PendingSamples:
        """Ask for samples of one prompt, sample i drawn from seed + i. Does not block.

        Args:
            prompt_ids: at least one id.
            sampling: how tokens are drawn.
            num_samples: at least 1.
            seed: None draws differently each time.
            min_weight_version: oldest weights to sample from; 0 accepts any.
            images: of the prompt.
            on_sample: called in the background thread with each sample as it comes; must not block, nor raise.
        """
        ask = Ask(
            prompt_ids=prompt_ids,
            sampling=sampling,
            num_samples=num_samples,
            seed=seed,
            min_weight_version=min_weight_version,
            images=images,
        )
        return PendingSamples(self._loop.start(self._sample, ask, on_sample))

    def note_weights(self, version: int, *, behind: Collection[str]) -> None:
        """Every server but those at the addresses `behind` serves this version now. Blocks, shortly."""
        self._loop.run(self._note, version, behind)

    def addresses(self) -> tuple[str, ...]:
        """host:port of the servers that are wanted now, and serve the model. To be called on the background loop."""
        return self._fleet.addresses

    def outdated(self) -> frozenset[str]:
        """Addresses of servers that are known to have older weights than were noted. Blocks, shortly."""
        return self._loop.run(self._look_for_outdated)

    def wait(self, pending: Iterable[PendingSamples]) -> bool:
        """Block until all of them are done, or until a server is found to have older weights than were noted.

        Returns:
            False for such a server; each is told of once.
        """
        outdated = self._outdated
        if all(one.is_done_before(outdated) for one in pending):
            return True
        self._outdated = concurrent.futures.Future()
        return False

    def stats(self) -> RolloutStats:
        """What was done so far."""
        return RolloutStats(samples=self._samples, retries=self._fleet.retries)

    # On the loop

    async def _note(self, version: int, behind: Collection[str]) -> None:
        await self._fleet.note_weights(version, behind)
        if not self._fleet.outdated:
            self._outdated = concurrent.futures.Future()

    async def _look_for_outdated(self) -> frozenset[str]:
        return self._fleet.outdated

    def _tell_outdated(self) -> None:
        if not self._outdated.done():
            self._outdated.set_result(None)

    async def _sample(self, ask: Ask, on_sample: Callable[[Sample], None]) -> list[Sample]:
        """All of them, by index."""
        samples: dict[int, Sample] = {}

        def arrive(index: int, sample: Sample) -> None:
            self._samples += 1
            samples[index] = sample
            on_sample(sample)

        await self._fleet.sample(ask, arrive, Deadline.after(self._sample_s))
        return [samples[index] for index in sorted(samples)]
