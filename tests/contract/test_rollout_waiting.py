"""An engine that goes on by itself is interrupted when something else is to be done, and its death ends the server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from kdmesh.errors import EngineFailure, Unavailable
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.table import JobTable
from kdmesh.types import DType, Sampling
from kdmesh.weights.manifest import Manifest, TensorSpec, UpdatePolicy
from kdmesh_rollout.config import FakeEngine as FakeEngineConfig
from kdmesh_rollout.engine import Finished
from kdmesh_rollout.fake_engine import FakeEngine
from kdmesh_rollout.metrics import Metrics
from kdmesh_rollout.scheduler import LoadedEngine, Scheduler
from kdmesh_rollout.work import SampleRequest
from tests.support.rollout_samples import prompt


class PatientEngine(FakeEngine):
    """A step lasts until it is interrupted, or until the test lets the samples be drawn."""

    def __init__(self) -> None:
        super().__init__(FakeEngineConfig(kind="fake"))
        self._changed = threading.Event()
        self.may_draw = False
        self.is_dead = False
        self.entered = threading.Semaphore(0)  # released by every step

    def step(self) -> list[Finished]:
        self.entered.release()
        while not self.may_draw:
            assert self._changed.wait(5)
            self._changed.clear()
            if self.is_dead:
                raise EngineFailure("a process died")
            if not self.may_draw:
                return []
        return super().step()

    def interrupt(self) -> None:
        self._changed.set()


class Running:
    """A scheduler at work."""

    def __init__(self, engine: PatientEngine, scheduler: Scheduler, working: asyncio.Task[None]) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.working = working

    async def until_running(self, samples: int) -> None:
        async with asyncio.timeout(5):
            while self.engine.num_running != samples:
                await asyncio.to_thread(self.engine.entered.acquire, timeout=5)


@contextlib.asynccontextmanager
async def running(terms: JobTerms | None = None) -> AsyncIterator[Running]:
    engine, thread = PatientEngine(), EngineThread()
    model = await thread.run(engine.load)
    loaded = LoadedEngine(engine=engine, thread=thread, model=model, check=lambda: None)
    jobs = JobTable(terms or JobTerms())
    scheduler = Scheduler(loaded, max_waiting_tokens=10_000, jobs=jobs, metrics=Metrics())
    working = asyncio.create_task(scheduler.run())
    try:
        yield Running(engine, scheduler, working)
    finally:
        working.cancel()
        engine.may_draw = True
        engine.interrupt()
        await asyncio.wait((working,))
        await asyncio.to_thread(thread.close, 5)


def request(samples: int = 1) -> SampleRequest:
    return SampleRequest(
        session=b"s",
        job="test",
        prompt_ids=prompt(3),
        num_samples=samples,
        sampling=Sampling(max_new_tokens=2),
        seed=1,
    )


async def test_a_request_joins_while_a_step_waits() -> None:
    async with running() as at:
        with at.scheduler.answering(request()), at.scheduler.answering(request(2)) as later:
            await at.until_running(3)
            with at.scheduler.answering(request()):
                await at.until_running(4)
            await at.until_running(3)  # and leaves
            at.engine.may_draw = True
            at.engine.interrupt()
            assert len([index async for index, _ in later]) == 2


async def test_a_request_joins_when_its_jobs_rate_lets_it_while_a_step_waits() -> None:
    async with running(JobTerms(max_requests_per_s=5)) as at:
        with at.scheduler.answering(request(6)):
            await at.until_running(6)


@pytest.mark.parametrize("policy", [UpdatePolicy.ABORT, UpdatePolicy.CONTINUE])
async def test_new_weights_do_not_wait_for_samples_under_way(policy: UpdatePolicy) -> None:
    tensor = TensorSpec(name="t", shape=(1,), dtype=DType.FLOAT32)
    manifest = Manifest(version=3, architecture_fingerprint="f", tensors=(tensor,), policy=policy)
    async with running() as at:
        with at.scheduler.answering(request()) as answers:
            await at.until_running(1)
            committed: list[int] = []
            async with asyncio.timeout(5):
                await at.scheduler.apply(manifest, lambda: committed.append(at.engine.num_running))
            assert committed == [0 if policy is UpdatePolicy.ABORT else 1]
            if policy is UpdatePolicy.ABORT:
                with pytest.raises(Unavailable):
                    await anext(aiter(answers))


@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_dead_engine_ends_the_scheduler_and_tells_who_waits(is_busy: bool) -> None:
    async with running() as at:
        with at.scheduler.answering(request()) if is_busy else contextlib.nullcontext() as answers:
            if is_busy:
                await at.until_running(1)
            at.engine.is_dead = True
            at.scheduler.engine_died("process 7 died")
            with pytest.raises(EngineFailure, match="process 7 died"):
                async with asyncio.timeout(5):
                    await asyncio.shield(at.working)
            if answers is not None:
                with pytest.raises(Unavailable):
                    await anext(aiter(answers))
