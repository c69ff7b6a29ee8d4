"""From a slot that the engine has written, or need not write, to the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kdmesh.errors import EngineFailure, HandleGone
from kdmesh.handles.slab.store import SlabStore, SlotLease
from kdmesh.rpc.background_tasks import BackgroundTasks
from kdmesh.tokens import digest
from kdmesh.types import TokenSequence
from kdmesh_teacher.cache.row_cache import Found, RowCache, shares
from kdmesh_teacher.engine import EngineDescription
from kdmesh_teacher.metrics import Metrics
from kdmesh_teacher.work import Answer, Work

log = logging.getLogger(__name__)


class RowsGone(Exception):
    """What the cache had of a request when it came, it has no more: look again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """How the rows of a batch came to be."""

    weight_version: int
    started_s: float
    engine_s: float


class Answering:
    """Publishes slots; what the cache has is copied to them before. Belongs to one event loop.

    The copies are made in threads, while the engine computes the next batch.
    """

    def __init__(self, store: SlabStore, model: EngineDescription, metrics: Metrics, cache: RowCache | None) -> None:
        self._store = store
        self._model = model
        self._metrics = metrics
        self._cache = cache
        self._copying = BackgroundTasks()

    @property
    def has_cache(self) -> bool:
        """Whether there are requests that the engine need not see."""
        return self._cache is not None

    def row_bytes(self, work: Work) -> int:
        """Bytes of a row of a request."""
        return self._model.row_bytes(work.layers)

    def find(
        self, job: str, sequences: Sequence[TokenSequence], layers: Sequence[int], *, wanted: int, served: int
    ) -> Found | None:
        """What the cache has of a request for rows of the wanted weights, 0 for any; None: it is not to be asked."""
        # Where weights are replaced, "any" are those of the request's turn, which nobody knows yet.
        is_certain = wanted or not self._model.architecture_fingerprint
        return self._cache.find(job, served, sequences, layers) if self._cache is not None and is_certain else None

    def answer_kept(
        self, batch: Sequence[tuple[Work, SlotLease]], weight_version: int
    ) -> tuple[list[Work], list[tuple[Work, SlotLease]]]:
        """Look again, and answer those whose rows are all kept; these, and the others, which are to be computed."""
        making = Making(weight_version=weight_version, started_s=time.monotonic(), engine_s=0.0)
        kept, others = list[Work](), []
        for work, lease in batch:
            if self._cache is not None and work.found is not None:
                work.found = self._cache.find_again(work.found)
            if work.found is not None and work.found.has_all:
                self.finish(work, lease, making)
                kept.append(work)
            else:
                others.append((work, lease))
        return kept, others

    def finish(self, work: Work, lease: SlotLease, making: Making) -> None:
        """Answer a request whose computed rows are in its slot, now or when the others are there too."""
        if work.found is None:
            self._publish(work, lease, making)
        else:
            self._copying.start(self._complete(work, work.found, lease, making))

    async def close(self) -> None:
        """Return when nothing is copied any more."""
        await self._copying.join()

    async def _complete(self, work: Work, found: Found, lease: SlotLease, making: Making) -> None:
        assert self._cache is not None
        row_bytes = self.row_bytes(work)
        outs = tuple(shares(lease.buffer, work.sequences, row_bytes=row_bytes))
        completing = asyncio.ensure_future(self._cache.complete(found, outs))
        await asyncio.wait((completing,))
        failure = completing.exception()
        if failure is None and completing.result():
            self._metrics.cache_used(work.job, work.sequences, found.is_kept, row_bytes=row_bytes)
            self._publish(work, lease, making)
            return
        self._store.cancel(lease)
        if failure is not None:
            log.error("cache failed", exc_info=failure)
        if not work.answer.done():
            work.answer.set_exception(RowsGone() if failure is None else EngineFailure("the cache failed"))

    def _publish(self, work: Work, lease: SlotLease, making: Making) -> None:
        if work.answer.done():  # cancelled while the engine computed it
            self._store.cancel(lease)
            return
        try:
            cols = self._model.hidden_size * (1 + len(work.layers))
            rows = self._store.publish(lease, rows=work.num_rows, cols=cols, dtype=self._model.dtype)
        except HandleGone as gone:
            work.answer.set_exception(gone)
            return
        answer = Answer(
            rows=rows,
            digest=digest(work.sequences, work.layers),
            weight_version=making.weight_version,
            queue_s=making.started_s - work.arrived_s,
            engine_s=making.engine_s,
        )
        work.answer.set_result(answer)
