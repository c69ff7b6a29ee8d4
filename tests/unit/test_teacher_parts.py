"""The parts of the teacher server that need no server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from kdmesh.errors import EngineFailure
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.throughput import Throughput
from kdmesh.types import DType
from kdmesh_teacher import probe
from kdmesh_teacher.config import FakeEngine as FakeEngineConfig
from kdmesh_teacher.config import SlabConfig
from kdmesh_teacher.engine import HeadParts, PrefillJob
from kdmesh_teacher.fake_engine import FakeEngine, as_bytes, hidden_states
from tests.support.teacher_requests import sequence

FAKE = FakeEngineConfig(kind="fake", hidden_size=8, vocabulary_size=60, max_batch_tokens=256)


@pytest.mark.parametrize("key", ["lease_s", "claim_s"])
def test_a_time_that_clients_cannot_be_told_or_keep_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 2592000"):
        SlabConfig.model_validate({key: 5_000_000})
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.1"):
        SlabConfig.model_validate({key: 0.001})


def test_speed_is_that_of_the_last_batches() -> None:
    speed = Throughput()
    assert (speed.tokens_per_s, speed.seconds_per_batch) == (None, None)
    speed.add(1000, 0.5)
    assert speed.seconds_per_batch == pytest.approx(0.5)
    for _ in range(50):
        speed.add(1000, 0.5)
    assert speed.tokens_per_s == pytest.approx(2000)


async def test_engine_calls_run_one_at_a_time_in_one_thread() -> None:
    thread = EngineThread()
    running, names = [], set()

    def call(value: int) -> int:
        running.append(value)
        names.add(threading.current_thread().name)
        assert len(running) == 1
        running.pop()
        return value * 2

    assert await asyncio.gather(*(thread.run(call, i) for i in range(20))) == [i * 2 for i in range(20)]
    assert names == {"engine"}
    assert thread.close(5)


async def test_engine_errors_reach_who_waits_and_the_thread_goes_on() -> None:
    thread = EngineThread()
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    assert await thread.run(lambda: "still here") == "still here"
    assert thread.close(5)


async def test_busy_engine_thread_does_not_keep_its_closer() -> None:
    thread, release = EngineThread(), threading.Event()
    stuck = thread.run(release.wait, 30)
    began_s = time.monotonic()
    assert not thread.close(0.05)
    assert time.monotonic() - began_s < 5
    release.set()
    assert await stuck
    assert thread.close(5)


@pytest.mark.parametrize("dtype", list(DType))
def test_fake_rows_are_exact_in_every_dtype(dtype: DType) -> None:
    rows_RD = hidden_states(sequence(50), 8)
    data = bytearray(as_bytes(rows_RD, dtype))
    np.testing.assert_array_equal(probe._float32(data, dtype), rows_RD.reshape(-1))


def test_fake_rows_see_the_past_and_only_the_past() -> None:
    long = sequence(30, seed=1)
    prefix = replace(long, token_ids=long.token_ids[:12], positions=long.positions[:11])
    rows_RD = hidden_states(long, 8)
    np.testing.assert_array_equal(rows_RD[:11], hidden_states(prefix, 8))
    changed = replace(long, token_ids=np.concatenate([[long.token_ids[0] ^ 1], long.token_ids[1:]]).astype(np.int32))
    assert (hidden_states(changed, 8) != rows_RD).any(axis=1).all()


def test_good_engine_passes_its_probe() -> None:
    engine = FakeEngine(FAKE)
    model = engine.load()
    probe.check_rows(engine, model)
    probe.check_head(engine.head_parts(), model)


class BadEngine(FakeEngine):
    """Changes the rows of every job after the first, or of all."""

    def __init__(self, damage: float, *, only_together: bool) -> None:
        super().__init__(FAKE)
        self._damage = damage
        self._first = 1 if only_together else 0

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        super().prefill(jobs)
        for job in jobs[self._first :]:
            values = np.frombuffer(job.out, dtype=np.float32).copy()
            values[-1] += self._damage
            job.out[:] = values.tobytes()


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (BadEngine(float("nan"), only_together=False), "not finite"),
        (BadEngine(float("inf"), only_together=False), "not finite"),
        (BadEngine(1e-3, only_together=True), "gets other rows in a batch than alone"),
        (BadEngine(float("nan"), only_together=True), "gets other rows in a batch than alone"),
    ],
)
def test_bad_engine_is_found_out(engine: FakeEngine, sentence: str) -> None:
    with pytest.raises(EngineFailure, match=sentence):
        probe.check_rows(engine, engine.load())


def test_engine_that_writes_nothing_is_found_out() -> None:
    engine = FakeEngine(FAKE)
    model = engine.load()
    engine.prefill = lambda jobs: None  # type: ignore[method-assign]
    with pytest.raises(EngineFailure, match="not finite"):
        probe.check_rows(engine, model)


def test_rounding_is_allowed_unless_the_engine_claims_determinism() -> None:
    engine = BadEngine(1e-6, only_together=True)
    model = engine.load()
    probe.check_rows(engine, replace(model, is_deterministic=False))
    with pytest.raises(EngineFailure, match="at most 0"):
        probe.check_rows(engine, model)


def test_head_of_another_size_is_found_out() -> None:
    engine = FakeEngine(FAKE)
    model, parts = engine.load(), engine.head_parts()
    assert parts.bias is not None
    for wrong in (
        HeadParts(weight=parts.weight[:-4], bias=parts.bias, dtype=parts.dtype),
        HeadParts(weight=parts.weight, bias=None, dtype=parts.dtype),
        HeadParts(weight=parts.weight, bias=parts.bias[:-4], dtype=parts.dtype),
    ):
        with pytest.raises(EngineFailure, match="head"):
            probe.check_head(wrong, model)


def test_speed_of_an_engine_that_counts_tokens_at_the_end_is_not_known_before_and_right_then() -> None:
    speed = Throughput()
    for _ in range(9):
        speed.add(0, 0.1)
    assert (speed.tokens_per_s, speed.seconds_per_batch) == (None, None)
    speed.add(500, 0.1)
    assert speed.tokens_per_s == pytest.approx(500)
    assert speed.seconds_per_batch == pytest.approx(1.0)
