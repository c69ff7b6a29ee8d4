"""One request on its way through a rollout server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kdmesh.errors import RpcError
from kdmesh.types import Int32Array, PlacedImage, Sample, Sampling
from kdmesh_rollout.engine import Order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleRequest:
    """Samples of one prompt, valid for the model."""

    session: bytes  # of the stream
    job: str  # for metrics
    prompt_ids: Int32Array
    num_samples: int
    sampling: Sampling
    seed: int | None  # sample i uses seed + i
    images: tuple[PlacedImage, ...] = ()  # of the prompt


class Answers:
    """The samples of one request as they come, until the last, a failure, or an abort.

    Attributes:
        began_s: when the engine began the first of them, in Unix time; None until then.
    """

    def __init__(self, num_samples: int) -> None:
        self.began_s: float | None = None
        self._left = num_samples
        self._outcomes: asyncio.Queue[tuple[int, Sample] | RpcError | None] = asyncio.Queue()

    def begin(self) -> None:
        """The engine begins one of them."""
        if self.began_s is None:
            self.began_s = time.time()

    def give(self, index: int, sample: Sample) -> None:
        """Sample number `index` has finished."""
        self._outcomes.put_nowait((index, sample))

    def fail(self, error: RpcError) -> None:
        """The others will not come."""
        self._outcomes.put_nowait(error)

    def abort(self) -> None:
        """Nobody wants the others."""
        self._outcomes.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Sample]]:
        """Raises the RpcError that `fail` was told."""
        while self._left:
            outcome = await self._outcomes.get()
            if outcome is None:
                return
            if isinstance(outcome, RpcError):
                raise outcome
            self._left -= 1
            yield outcome


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """One sample of a request, and where it goes."""

    session: bytes
    job: str
    order: Order
    index: int
    num_tokens: int  # of the prompt, and of the longest response allowed
    arrived_s: float
    answers: Answers
