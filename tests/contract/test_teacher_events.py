"""Whatever happens in whatever order, a teacher answers each request once, with its rows, and gets everything back."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from kdmesh.errors import HandleGone, RpcError, Withdrawn
from kdmesh.handles.slab.reports import SlotState
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.jobs.table import JobTable
from kdmesh.types import EVERY_TAG, DType, Handle, TokenSequence
from kdmesh.weights.manifest import Manifest, TensorSpec, UpdatePolicy
from kdmesh_teacher.config import FakeEngine as FakeEngineConfig
from kdmesh_teacher.config import TeacherJobTerms
from kdmesh_teacher.engine import PrefillJob
from kdmesh_teacher.fake_engine import FakeEngine, as_bytes, hidden_states
from kdmesh_teacher.metrics import Metrics
from kdmesh_teacher.parts import Parts
from kdmesh_teacher.start import start
from kdmesh_teacher.work import Answer
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import teacher_config

SEQUENCES = tuple(sequence(2 + 5 * seed, seed=seed, every=1 + seed % 2) for seed in range(8))

TENSORS = (TensorSpec(name="trunk", shape=(8,), dtype=DType.FLOAT32),)


class FailingEngine(FakeEngine):
    """A fake engine whose rows say which weights made them, and whose next batches fail when a test says so."""

    def __init__(self, config: FakeEngineConfig) -> None:
        super().__init__(config)
        self.num_failures = 0

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        if self.num_failures and jobs[0].segment is not None:  # which a check of the engine has not
            self.num_failures -= 1
            raise RuntimeError("made up")
        super().prefill(jobs)

    def serve(self, version: int) -> None:
        """Make the rows of these weights from now on."""
        self._trunk_D = np.full(self._config.hidden_size, 2.0 ** (version - 1), np.float32)


class Clients:
    """Clients of every kind, who do something at random with each `step`."""

    def __init__(self, parts: Parts, engine: FailingEngine, rng: random.Random) -> None:
        self.parts, self.store, self.engine, self.rng = parts, parts.store, engine, rng
        self.sessions: dict[bytes, str] = {}
        self.asking: dict[asyncio.Task[None], None] = {}
        self.held: list[tuple[bytes, Handle]] = []
        self.update = self.nap = asyncio.create_task(asyncio.sleep(0))
        self.num_asked = 0
        self.outcomes = Counter[str]()
        self.actions: Sequence[Callable[[], object]] = [
            *[self.ask] * 10,
            *[self.release] * 6,
            self.cancel,
            self.open,
            self.close,
            self.fail,
            self.change_terms,
            self.replace_weights,
            self.fall_asleep,
        ]
        self.open()

    async def step(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0, 0.0005, 0.002]))
        self.sessions = {token: job for token, job in self.sessions.items() if self.store.is_open(token)}
        self.rng.choice(self.actions if self.sessions else [self.open])()

    def ask(self) -> None:
        if len(self.asking) < 20:
            asking = asyncio.create_task(self.rows(*self.rng.choice(list(self.sessions.items()))))
            self.asking[asking] = None
            self.num_asked += 1
            asking.add_done_callback(self.asking.pop)

    async def rows(self, session: bytes, job: str) -> None:
        wanted = tuple(self.rng.choices(SEQUENCES, k=self.rng.randint(1, 3)))
        version = self.rng.choice([0, self.parts.scheduler.weights.version])
        deadline_s = self.rng.choice([math.inf, math.inf, 0.02])
        try:
            self.parts.sleep.require_weights()
            answer = await self.parts.scheduler.prefill(
                session, job, wanted, weight_version=version, deadline_s=deadline_s
            )
        except (RpcError, asyncio.CancelledError) as end:
            self.outcomes[type(end).__name__] += 1
            return
        assert version in (0, answer.weight_version)
        self.look_at(session, wanted, answer)
        self.outcomes["ok"] += 1
        self.held.append((session, answer.rows))

    def look_at(self, session: bytes, wanted: Sequence[TokenSequence], answer: Answer) -> None:
        rows = np.concatenate([hidden_states(one, 8) for one in wanted]) * np.float32(
            2.0 ** (answer.weight_version - 1)
        )
        with contextlib.suppress(HandleGone), self.store.reading(session, answer.rows) as data:
            assert bytes(data) == as_bytes(rows, answer.rows.dtype)

    def release(self) -> None:
        if self.held:
            session, handle = self.held.pop(self.rng.randrange(len(self.held)))
            assert self.store.release(session, handle) == self.store.is_open(session)
            assert not self.store.release(session, handle)

    def cancel(self) -> None:
        if self.asking:
            self.rng.choice(list(self.asking)).cancel()

    def open(self) -> None:
        job = self.rng.choice("abc")
        self.sessions[self.store.open_session(job)] = job

    def close(self) -> None:
        self.store.close_session(self.rng.choice(list(self.sessions)))

    def fail(self) -> None:
        self.engine.num_failures = 1

    def change_terms(self) -> None:
        terms = TeacherJobTerms(
            weight=self.rng.choice([0.5, 3]),
            priority=self.rng.choice(["high", "low"]),
            max_tokens_in_flight=self.rng.choice([None, 10, 100]),
            max_requests_per_s=self.rng.choice([None, 500]),
            max_bytes_in_flight=self.rng.choice([None, 100_000]),
        )
        self.parts.jobs.override(self.rng.choice("abc"), terms)

    def replace_weights(self) -> None:
        if self.update.done():
            self.update = asyncio.create_task(self.new_weights(self.parts.scheduler.weights.version + 1))

    async def new_weights(self, version: int) -> None:
        def commit() -> None:
            if version % 3 == 0:
                raise Withdrawn("not these")
            self.engine.serve(version)

        manifest = Manifest(architecture_fingerprint="", version=version, policy=UpdatePolicy.FINISH, tensors=TENSORS)
        with contextlib.suppress(Withdrawn):
            await self.parts.scheduler.apply(manifest, commit)

    def fall_asleep(self) -> None:
        if self.nap.done():
            self.nap = asyncio.create_task(self.sleep_a_while())

    async def sleep_a_while(self) -> None:
        await self.parts.sleep.sleep(EVERY_TAG)
        await asyncio.sleep(0.002)
        await self.parts.sleep.wake(EVERY_TAG)


@pytest.mark.parametrize("seed", range(4))
async def test_every_request_is_answered_once_and_nothing_is_left(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    config = teacher_config(
        engine={"max_batch_tokens": 128, "updatable": True},
        slab={"slots": rng.randint(1, 4), "slots_per_session": rng.randint(1, 3)},
        queue={"max_tokens": rng.choice([200, 100_000]), "max_wait_s": rng.choice([0.05, 5])},
        cache={"memory_mib": rng.choice([0.002, 1])},
    )
    assert isinstance(config.engine, FakeEngineConfig)
    engine, thread, jobs = FailingEngine(config.engine), EngineThread(), JobTable(TeacherJobTerms())
    metrics, gate = Metrics(), Gate[Parts]()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, thread.close, 5)
        parts = await start(
            config,
            engine,
            thread,
            jobs=jobs,
            socket_path=tmp_path / "socket",
            metrics=metrics,
            gate=gate,
            stack=stack,
        )
        gate.open(parts)
        running = asyncio.create_task(parts.run())
        clients = Clients(parts, engine, rng)
        for _ in range(400):
            await clients.step()
            assert not running.done()
        for job in "abc":
            jobs.reset(job)
        await clients.nap
        await clients.update
        async with asyncio.timeout(20):  # all get through when what is answered is released
            while clients.asking:
                await asyncio.sleep(0.001)
                clients.release()
        while clients.held:
            clients.release()
        await parts.scheduler.wait_idle()
        assert clients.outcomes["ok"]
        assert sum(clients.outcomes.values()) == clients.num_asked
        assert (parts.scheduler.queue.num_tokens, parts.scheduler.queue.num_requests) == (0, 0)
        assert all(book.tokens_in_flight == 0 for book in jobs.books().values())
        assert parts.store.snapshot().slots[SlotState.FREE] == config.slab.slots
        assert not parts.store.slots_by_job()
        computed = {job: book.tokens for job, book in jobs.books().items() if book.tokens}
        assert computed == {
            sample.labels["kdmesh_job"]: sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == "kdmesh_teacher_tokens_total"
        }
        running.cancel()
        await asyncio.wait((running,))
