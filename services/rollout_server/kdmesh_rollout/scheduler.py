"""Requests in, decoding steps of the engine, samples out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kdmesh.errors import EngineFailure, RpcError, Unavailable, Withdrawn
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.fair_queue import FairQueue
from kdmesh.serving.jobs.table import JobTable
from kdmesh.serving.jobs.waiting_line import WaitingLine
from kdmesh.weights.manifest import Manifest, UpdatePolicy
from kdmesh_rollout.engine import Engine, EngineDescription, Finished, Order
from kdmesh_rollout.metrics import Metrics
from kdmesh_rollout.work import Answers, SampleRequest, Work

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """An engine that samples, and the thread it lives on."""

    engine: Engine
    thread: EngineThread
    model: EngineDescription
    check: Callable[[], None]  # blocks on the engine's thread; raises when the engine is broken for good


@dataclass(slots=True, kw_only=True, eq=False)
class _Update:
    """New weights that are to be committed."""

    policy: UpdatePolicy
    commit: Callable[[], None]
    done: asyncio.Future[None]


class Scheduler:
    """Decides what the engine decodes next. Not thread-safe: it belongs to one event loop.

    Between two steps new samples join, unwanted ones leave, and new weights are committed.

    Attributes:
        jobs: what each job may take, and has taken.
    """

    def __init__(
        self, engine: LoadedEngine, *, max_waiting_tokens: int, jobs: JobTable[JobTerms], metrics: Metrics
    ) -> None:
        self.jobs = jobs
        self._engine = engine
        self._metrics = metrics
        self._line = WaitingLine[Work](jobs, max_tokens=max_waiting_tokens)
        self._queue = self._line.queue
        self._keys = itertools.count()
        self._running: dict[int, Work] = {}
        self._unwanted: list[int] = []  # keys that the engine has still to forget
        self._update: _Update | None = None
        self._death: str | None = None
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        jobs.on_change = self._wake.set

    @property
    def queue(self) -> FairQueue[Work]:
        """What waits; for looking only."""
        return self._queue

    @property
    def num_running(self) -> int:
        """Samples being decoded."""
        return len(self._running)

    @property
    def tokens_per_s(self) -> float | None:
        """Measured speed of the engine; None before its first step."""
        return self._line.throughput.tokens_per_s

    @contextlib.contextmanager
    def answering(self, request: SampleRequest) -> Iterator[Answers]:
        """The samples of a request as they come; on exit, what is unfinished is forgotten.

        Raises:
            Unavailable: the queue is full.
        """
        answers = Answers(request.num_samples)
        works = [self._work(request, index, answers) for index in range(request.num_samples)]
        self._line.join(works)
        self._wake.set()
        try:
            yield answers
        finally:
            for work in works:
                self._forget(work)

    async def apply(self, manifest: Manifest, commit: Callable[[], None]) -> None:
        """Call `commit` in the engine's thread between two steps, after what manifest.policy asks for.

        May be cancelled before that.

        Raises:
            Unavailable: the engine has died.
        """
        if self._death is not None:
            raise _died()
        update = _Update(policy=manifest.policy, commit=commit, done=asyncio.get_running_loop().create_future())
        self._update = update
        self._wake.set()
        try:
            await update.done
        finally:
            if self._update is update:
                self._update = None
                self._wake.set()

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            EngineFailure: the engine is broken for good; every request has been told.
        """
        while True:
            self._wake.clear()
            if self._death is not None:
                self._give_up(_died())
                if self._update is not None and not self._update.done.done():
                    self._update.done.set_exception(_died())
                raise EngineFailure(self._death)
            if self._update is not None:
                await self._make_way(self._update)
            orders = self._take()
            if orders or self._running or self._unwanted:
                await self._advance(orders)
            else:
                self._settled.set()
                await self._line.until_woken(self._wake)

    def refuse_waiting(self, error: RpcError) -> None:
        """Fail samples that have not begun."""
        for work in self._queue.everything():
            self._queue.remove(work)
            work.answers.fail(error)

    async def wait_idle(self) -> None:
        """Return when nothing is drawn, and the engine has forgotten what nobody wants."""
        self._settled.clear()
        self._wake.set()
        await self._settled.wait()

    def engine_died(self, reason: str) -> None:
        """Let `run` raise EngineFailure; a step under way must fail by itself."""
        self._death = reason
        self._wake.set()

    def engine_is_replaced(self) -> None:
        """The dead engine's place is taken by another, which knows no sample; `run` may be called again."""
        self._death = None
        self._unwanted = []

    # Waiting

    def _work(self, request: SampleRequest, index: int, answers: Answers) -> Work:
        seed = None if request.seed is None else (request.seed + index) % 2**64
        order = Order(
            key=next(self._keys),
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            seed=seed,
            images=request.images,
        )
        return Work(
            session=request.session,
            job=request.job,
            order=order,
            index=index,
            num_tokens=min(
                len(request.prompt_ids) + request.sampling.max_new_tokens, self._engine.model.max_sequence_tokens
            ),
            arrived_s=time.monotonic(),
            answers=answers,
        )

    def _take(self) -> list[Order]:
        """What joins now: nothing while an update waits for the samples under way."""
        if self._update is not None:
            return []
        return [order for _, order in self._line.take(math.inf, self._has_room, self._start)]

    def _has_room(self, work: Work) -> bool:
        return len(self._running) < self._engine.model.max_running

    def _start(self, work: Work) -> Order:
        self._running[work.order.key] = work
        work.answers.begin()
        self._metrics.sample_started(work.job, waited_s=time.monotonic() - work.arrived_s)
        return work.order

    def _end(self, key: int) -> Work | None:
        """The engine is to work on a sample no longer; None when it did not."""
        work = self._running.pop(key, None)
        if work is not None:
            self.jobs.ended(work.job, work.num_tokens)
        return work

    def _forget(self, work: Work) -> None:
        if work in self._queue:
            self._queue.remove(work)
        elif self._end(work.order.key) is not None:
            self._unwanted.append(work.order.key)
        self._wake.set()

    # Running

    async def _advance(self, orders: Sequence[Order]) -> None:
        unwanted, self._unwanted = self._unwanted, []
        engine = self._engine.engine
        before = engine.num_drawn_tokens + engine.num_prefilled_tokens
        began_s = time.monotonic()
        call = self._engine.thread.run(self._step, unwanted, orders)
        await self._done_or_woken(call)
        seconds = time.monotonic() - began_s
        failure = call.exception()
        if failure is not None and self._death is not None:
            return  # `run` is next, and tells everybody
        if failure is not None:
            log.error("engine failed on a step", extra={"samples": len(self._running)}, exc_info=failure)
            self._end_running(
                EngineFailure("the engine failed while this was sampled; the server's log has the details")
            )
            await self._check()
            return
        self._line.computed(engine.num_drawn_tokens + engine.num_prefilled_tokens - before, seconds)
        self._metrics.step_done(seconds)
        for finished in call.result():
            work = self._end(finished.key)
            if work is not None:  # else it was aborted during the step
                self.jobs.computed(work.job, finished.sample.num_tokens)
                self._metrics.sample_done(work.job, finished.sample)
                work.answers.give(work.index, finished.sample)

    async def _done_or_woken(self, call: asyncio.Future[list[Finished]]) -> None:
        """Wait until a step is over; one that could wait for long is told when something else is to be done."""
        woken = asyncio.ensure_future(self._line.until_woken(self._wake))
        await asyncio.wait((call, woken), return_when=asyncio.FIRST_COMPLETED)
        woken.cancel()
        if not call.done():
            self._engine.engine.interrupt()
            # Not `await call`: whatever the engine raises ends what is under way, and nothing else.
            await asyncio.wait((call,))

    def _step(self, unwanted: Sequence[int], orders: Sequence[Order]) -> list[Finished]:
        """On the engine's thread."""
        engine = self._engine.engine
        for key in unwanted:
            engine.abort(key)
        for order in orders:
            engine.add(order)
        return engine.step() if engine.num_running else []

    def _end_running(self, error: RpcError) -> None:
        for key, work in tuple(self._running.items()):
            work.answers.fail(error)
            self._unwanted.append(key)
            self._end(key)

    async def _check(self) -> None:
        """Go on if the engine still samples."""
        unwanted, self._unwanted = self._unwanted, []

        def check() -> None:
            for key in unwanted:
                self._engine.engine.abort(key)
            self._engine.check()

        call = self._engine.thread.run(check)
        await asyncio.wait((call,))
        failure = call.exception()
        if failure is not None:
            self._give_up(EngineFailure("the engine is broken; the server restarts"))
            raise EngineFailure("the engine is broken: it fails on the fixed prompt too") from failure

    def _give_up(self, error: RpcError) -> None:
        self.refuse_waiting(error)
        self._end_running(error)

    # Weights

    async def _make_way(self, update: _Update) -> None:
        """Commit new weights, unless samples under way are to be finished first."""
        if update.policy is UpdatePolicy.FINISH and self._running:
            return
        if update.policy is UpdatePolicy.ABORT:
            self._end_running(Unavailable("an update of the weights aborted this; ask again", retry_after_s=0.0))
        if self._unwanted:
            unwanted, self._unwanted = self._unwanted, []
            await self._engine.thread.run(self._abort, unwanted)
        if self._update is not update:
            return  # withdrawn meanwhile
        call = self._engine.thread.run(update.commit)
        await asyncio.wait((call,))
        self._update = None
        failure = call.exception()
        if update.done.cancelled():
            pass
        elif failure is None:
            update.done.set_result(None)
        else:
            update.done.set_exception(failure)
        if failure is not None and not isinstance(failure, Withdrawn) and self._death is None:
            # Nobody knows which weights the engine has.
            self._give_up(EngineFailure("new weights could not be taken over; the server restarts"))
            raise EngineFailure("new weights could not be taken over") from failure

    def _abort(self, keys: Sequence[int]) -> None:
        """On the engine's thread."""
        for key in keys:
            self._engine.engine.abort(key)


def _died() -> Unavailable:
    """Not EngineFailure, which says that it may be the request's fault, and is not asked again."""
    return Unavailable("the engine died; ask again", retry_after_s=1.0)
