"""Requests in, batches to the engine, handles out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kdmesh.errors import DeadlineExpired, EngineFailure, HandleGone, ModelMismatch, RpcError, Unavailable, Withdrawn
from kdmesh.handles.slab.reports import SessionEnd
from kdmesh.handles.slab.store import SlabStore, SlotLease
from kdmesh.serving.jobs.fair_queue import FairQueue
from kdmesh.serving.jobs.table import JobTable, Shortage
from kdmesh.serving.jobs.waiting_line import WaitingLine
from kdmesh.types import Handle, ServerLoad, TokenSequence
from kdmesh.weights.manifest import Manifest
from kdmesh_teacher import admission, shortages
from kdmesh_teacher.answering import Answering, Making, RowsGone
from kdmesh_teacher.cache.row_cache import Found
from kdmesh_teacher.config import TeacherJobTerms
from kdmesh_teacher.engine import HeadParts, LoadedEngine
from kdmesh_teacher.metrics import Metrics
from kdmesh_teacher.served import ServedWeights, matrices_of, room_for_another_head
from kdmesh_teacher.work import Answer, Work

log = logging.getLogger(__name__)

_DEATH_HINT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """Bounds on waiting."""

    max_tokens: int  # over all jobs
    max_wait_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Update:
    """New weights that are to be committed."""

    version: int
    commit: Callable[[], None]
    head: tuple[Handle, ...]  # room for theirs
    done: asyncio.Future[None]


class Scheduler:
    """Decides what the engine computes next. Not thread-safe: it belongs to one event loop.

    A request starts only when it has a slot to write in, so that the engine never waits for a
    reader, and a session that holds all its slots delays nobody else. Between two batches new weights are
    committed, with their head.

    Attributes:
        weights: what is served now.
        jobs: what each job may take, and has taken.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        store: SlabStore,
        limits: QueueLimits,
        jobs: JobTable[TeacherJobTerms],
        metrics: Metrics,
        weights: ServedWeights,
        answering: Answering,
    ) -> None:
        self.weights = weights
        self.jobs = jobs
        self._engine = engine
        self._store = store
        self._limits = limits
        self._metrics = metrics
        self._answering = answering
        self._line = WaitingLine[Work](jobs, max_tokens=limits.max_tokens, batch_tokens=engine.model.max_batch_tokens)
        self._queue = self._line.queue
        self._death: str | None = None
        self._update: _Update | None = None
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        store.on_free = self._wake.set
        store.on_session_end = self._end_session
        jobs.on_change = self._wake.set

    @property
    def queue(self) -> FairQueue[Work]:
        """What waits; for looking only."""
        return self._queue

    @property
    def load(self) -> ServerLoad:
        """What is to be done, and how fast."""
        return self._line.load

    async def prefill(
        self,
        session: bytes,
        job: str,
        sequences: tuple[TokenSequence, ...],
        *,
        layers: tuple[int, ...] = (),
        weight_version: int = 0,
        uses_cache: bool = True,
        deadline_s: float = math.inf,
        may_begin_again: Callable[[], object] = lambda: None,
    ) -> Answer:
        """The rows of a request that was checked. Cancelling this gives its place, or its slot, back.

        Args:
            session: whose slot it takes.
            job: whose share of the engine it takes.
            sequences: valid for the model.
            layers: of the model, whose outputs are to be a part of every row.
            weight_version: of the weights that must make the rows, which are served now; 0: any.
            uses_cache: whether rows that were kept will do, and these may be kept.
            deadline_s: longest wait for the start that the caller accepts.
            may_begin_again: asked, once kept rows turn out to be gone, whether the engine may still be given them to
                compute; it raises when not.

        Raises:
            Unavailable: the queue is full, or the prefill did not start within the queue's limit.
            DeadlineExpired: it did not start within deadline_s.
            HandleGone: the session ended.
            ModelMismatch: the weights were replaced before its turn came.
            EngineFailure: the engine failed on its batch.
        """
        loop = asyncio.get_running_loop()
        began_s, left_s = loop.time(), deadline_s
        while True:
            admission.check_version(weight_version, self.weights.version)  # replaced while the cache was read?
            work = Work(
                session=session,
                job=job,
                sequences=sequences,
                layers=layers,
                weight_version=weight_version,
                found=self._find(job, sequences, layers, weight_version) if uses_cache else None,
                arrived_s=time.monotonic(),
                answer=loop.create_future(),
            )
            with contextlib.suppress(RowsGone):
                return await self._answer(work, left_s)
            self.jobs.waits_again(job)
            may_begin_again()  # the engine may have gone to sleep, which nothing held up while the cache was read
            left_s = deadline_s - (loop.time() - began_s)

    async def apply(self, manifest: Manifest, commit: Callable[[], None]) -> None:
        """Call `commit` in the engine's thread between two batches, and serve the new head from then on.

        May be cancelled before that.

        Raises:
            Unavailable: there is no memory for another head; `commit` was not called.
        """
        update = _Update(
            version=manifest.version,
            commit=commit,
            head=await room_for_another_head(self._store, self.weights),
            done=asyncio.get_running_loop().create_future(),
        )
        self._update = update
        self._wake.set()
        try:
            await update.done
        finally:
            self._update = None
            if self.weights.head is not update.head:
                self._store.retire_shared_segment(update.head)

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            EngineFailure: the engine is broken for good; every request has been told.
        """
        while True:
            self._wake.clear()
            if self._death is not None:
                self._refuse(self._queue.everything(), _died())
                raise EngineFailure(self._death)
            if self._update is not None:
                await self._replace_weights(self._update)
            batch = self._line.take(self._engine.model.max_batch_tokens, self._can_start, self._acquire)
            if batch:
                await self._run(batch)
            else:
                self._settled.set()
                await self._line.until_woken(self._wake)

    def refuse_waiting(self, error: Unavailable) -> None:
        """Fail everything that has not begun."""
        self._refuse(self._queue.everything(), error)

    async def wait_idle(self) -> None:
        """Return when nothing can be computed and nothing is."""
        self._settled.clear()
        self._wake.set()
        await self._settled.wait()

    def engine_died(self, reason: str) -> None:
        """Let `run` raise EngineFailure; a batch under way must fail by itself."""
        self._death = reason
        self._wake.set()

    def engine_is_replaced(self) -> None:
        """The dead engine's place is taken by another, so `run` may be called again."""
        self._death = None

    # Waiting

    def _find(
        self, job: str, sequences: tuple[TokenSequence, ...], layers: tuple[int, ...], weight_version: int
    ) -> Found | None:
        return self._answering.find(job, sequences, layers, wanted=weight_version, served=self.weights.version)

    async def _answer(self, work: Work, deadline_s: float) -> Answer:
        self._push(work)
        wait_s = min(deadline_s, self._limits.max_wait_s)
        timer = asyncio.get_running_loop().call_later(wait_s, self._expire, work, wait_s, deadline_s <= wait_s)
        try:
            return await work.answer
        except asyncio.CancelledError:
            self._discard(work)
            raise
        finally:
            timer.cancel()

    def _push(self, work: Work) -> None:
        if not self._store.is_open(work.session):
            raise HandleGone("the session is unknown or its lease has ended; open a new one")
        self._line.join([work])
        self._wake.set()

    def _can_start(self, work: Work) -> bool:
        return self._store.may_acquire(work.session) and not shortages.is_over_bytes(self._store, self.jobs, work.job)

    def _acquire(self, work: Work) -> SlotLease | None:
        try:
            return self._store.try_acquire(work.session)
        except HandleGone:  # on_session_end is about to tell its requests
            return None

    def _expire(self, work: Work, waited_s: float, is_own_deadline: bool) -> None:
        if work not in self._queue:
            return
        shortage, reason = shortages.why_waiting(self._store, self.jobs, self._queue, work)
        self.jobs.refused(work.job, shortage)
        message = f"the prefill did not start within {waited_s:g} s: {reason}"
        if is_own_deadline:
            self._refuse([work], DeadlineExpired(message))
            return
        self._queue.remove(work)
        self._tell(work, Unavailable(message, retry_after_s=self._retry_after_s(work, shortage)))

    def _retry_after_s(self, work: Work, shortage: Shortage) -> float:
        if shortage in (Shortage.SLOTS, Shortage.BYTES_IN_FLIGHT):
            return shortages.SLOT_HINT_S
        return self._line.seconds_until_start(work.job, work.num_tokens)

    def _end_session(self, end: SessionEnd) -> None:
        self.jobs.abandoned(end.job, end.abandoned)
        works = self._queue.of_session(end.job, end.token)
        self._refuse(works, HandleGone("the session has ended; open a new one"))

    def _refuse(self, works: Iterable[Work], error: RpcError) -> None:
        for work in works:
            self._queue.remove(work)
            self._tell(work, error)

    def _tell(self, work: Work, error: RpcError) -> None:
        """What does not wait any longer fails."""
        if not work.answer.done():
            work.answer.set_exception(error)
        self._wake.set()  # the next in line may fit where this one did not

    def _discard(self, work: Work) -> None:
        """Nobody waits for this answer any more."""
        if work in self._queue:
            self._queue.remove(work)
            self._wake.set()
        elif work.answer.done() and not work.answer.cancelled() and work.answer.exception() is None:
            self._store.release(work.session, work.answer.result().rows)

    # Running

    async def _run(self, batch: list[tuple[Work, SlotLease]]) -> None:
        kept, batch = self._answering.answer_kept(batch, self.weights.version)
        for work in kept:
            self.jobs.ended(work.job, work.num_tokens)
        if not batch:
            return
        started_s, version = time.monotonic(), self.weights.version
        row_bytes = self._answering.row_bytes
        jobs = [job for work, lease in batch for job in work.prefill_jobs(lease, row_bytes=row_bytes(work))]
        self._line.batch_began(sum(work.num_tokens_to_compute() for work, _ in batch))
        call = self._engine.thread.run(self._engine.engine.prefill, jobs)
        await self._meanwhile(call)
        making = Making(weight_version=version, started_s=started_s, engine_s=time.monotonic() - started_s)
        failure = call.exception()
        for work, lease in batch:
            if failure is None:
                self._answering.finish(work, lease, making)
            else:
                self._store.cancel(lease)
                self._fail(work)
        self._account([work for work, _ in batch], making)
        if failure is not None:
            log.error("engine failed on a batch", extra={"requests": len(batch)}, exc_info=failure)
            if self._death is None:
                await self._check()

    async def _meanwhile(self, call: asyncio.Future[None]) -> None:
        """Return when the engine is done; whatever it raises ends its batch, and nothing else.

        What needs only a slot does not wait for it.
        """
        while self._answering.has_cache and not call.done():
            self._wake.clear()
            zero_cost = self._line.take(0, self._can_start, self._acquire)
            self._answering.answer_kept(zero_cost, self.weights.version)
            woken = asyncio.ensure_future(self._line.until_woken(self._wake))
            await asyncio.wait((call, woken), return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()
        await asyncio.wait((call,))
        self._wake.set()  # what came meanwhile is looked at again

    def _account(self, works: list[Work], making: Making) -> None:
        """Write down what a batch cost, well or not: the jobs had the engine."""
        for work in works:
            self.jobs.ended(work.job, work.num_tokens)
            self.jobs.computed(work.job, work.num_tokens_to_compute())
        self._line.computed(sum(work.num_tokens_to_compute() for work in works), making.engine_s)
        self._metrics.batch_done(works, started_s=making.started_s, engine_s=making.engine_s)

    def _fail(self, work: Work) -> None:
        if work.answer.done():
            return
        if self._death is not None:
            work.answer.set_exception(_died())
        else:
            work.answer.set_exception(
                EngineFailure("the engine failed on the batch of this request; the server's log has the details")
            )

    async def _check(self) -> None:
        """Go on if the engine still computes."""
        check = self._engine.thread.run(self._engine.check)
        await asyncio.wait((check,))
        failure = check.exception()
        if failure is not None:
            self._refuse(self._queue.everything(), EngineFailure("the engine is broken; the server restarts"))
            raise EngineFailure("the engine is broken: it fails on the fixed sequences too") from failure

    # Weights

    async def _replace_weights(self, update: _Update) -> None:
        """Commit new weights, share their head, and refuse what waits for others."""
        self._update = None

        def commit() -> HeadParts:
            update.commit()
            return self._engine.engine.head_parts()

        call = self._engine.thread.run(commit)
        await asyncio.wait((call,))
        failure = call.exception()
        if failure is None:
            await self._store.fill_shared_segment(update.head, matrices_of(call.result()))
            self._serve(ServedWeights(version=update.version, head=update.head))
        if update.done.cancelled():
            pass
        elif failure is None:
            update.done.set_result(None)
        else:
            update.done.set_exception(failure)
        if failure is not None and not isinstance(failure, Withdrawn) and self._death is None:
            # Nobody knows which weights the engine has.
            self._refuse(self._queue.everything(), EngineFailure("new weights could not be taken over"))
            raise EngineFailure("new weights could not be taken over; the server restarts") from failure

    def _serve(self, weights: ServedWeights) -> None:
        old, self.weights = self.weights, weights
        self._store.retire_shared_segment(old.head)
        for work in tuple(self._queue.everything()):
            try:
                admission.check_version(work.weight_version, weights.version)
            except ModelMismatch as error:
                self._refuse([work], error)


def _died() -> Unavailable:
    """For requests that are not at fault: others may answer them, or this server when its engine is back."""
    return Unavailable("the engine died; ask again", retry_after_s=_DEATH_HINT_S)
