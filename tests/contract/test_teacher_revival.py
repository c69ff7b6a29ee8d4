"""A teacher whose engine dies is not ready at once, and answers again when another engine has taken its place."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from kdmesh import errors
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.serving.engine.revival import RestartLimits
from kdmesh.types import EVERY_TAG
from kdmesh_teacher.config import FakeEngine
from tests.support.teacher_engines import MortalEngine
from tests.support.teacher_requests import expected_rows, sequence
from tests.support.teacher_server import served, teacher_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Mortal:
    """A server, and its engine."""

    engine: MortalEngine
    address: str
    rest: str
    ended: asyncio.Task[None]

    async def get(self, path: str) -> tuple[int, Any]:
        async with httpx.AsyncClient() as http:
            answer = await http.get(f"http://{self.rest}{path}")
        return answer.status_code, answer.json()

    async def until_ready(self) -> None:
        async with asyncio.timeout(10):
            while (await self.get("/readyz"))[0] != 200:
                pass  # each look is a round trip through the server's loop


@contextlib.asynccontextmanager
async def mortal(directory: Path, *, restarts: int = 2, window_s: float = 60) -> AsyncIterator[Mortal]:
    config = teacher_config()
    assert isinstance(config.engine, FakeEngine)
    engine = MortalEngine(config.engine, RestartLimits(restarts=restarts, window_s=window_s))
    async with served(config, engine, directory) as (addresses, _, ended):
        yield Mortal(engine=engine, address=addresses.grpc, rest=addresses.rest, ended=ended)
        engine.let_go()


@contextlib.asynccontextmanager
async def client_of(server: Mortal) -> AsyncIterator[TeacherClient]:
    client = await TeacherClient.connect(server.address, SessionOptions(job="test", door="shm"))
    try:
        yield client
    finally:
        await client.close()


async def test_requests_of_a_dead_engine_are_answered_by_the_next_one(tmp_path: Path) -> None:
    async with mortal(tmp_path) as server, client_of(server) as client:
        held = await client.prefill([sequence(9)], Deadline.after(10))
        server.engine.hold()
        running = asyncio.create_task(client.prefill([sequence(8)], Deadline.after(10)))
        await asyncio.to_thread(server.engine.wait_entered)
        waiting = asyncio.create_task(client.prefill([sequence(7)], Deadline.after(10)))
        while (await server.get("/v1/slab"))[1]["waiting"]["requests"] < 1:
            pass
        server.engine.kill()
        reason = "the server's engine died; ask again in a while, or elsewhere"
        for path in ("/readyz", "/reachz"):
            assert await server.get(path) == (503, {"reason": reason})
        assert (await server.get("/healthz"))[0] == 200
        with pytest.raises(errors.Unavailable, match="the server's engine died"):
            await client.prefill([sequence(6)], Deadline.after(10))
        server.engine.let_go()
        for unanswered in (running, waiting):
            with pytest.raises(errors.Unavailable, match="the engine died; ask again"):
                await unanswered
        await server.until_ready()
        assert torch.equal(held.rows_RD, expected_rows([sequence(9)]))
        del held
        gc.collect()
        for number in range(6):  # more than there are slots
            rows = await client.prefill([sequence(10 + number)], Deadline.after(10))
            assert torch.equal(rows.rows_RD, expected_rows([sequence(10 + number)]))
            del rows
            gc.collect()
        assert server.engine.num_starts == 2


async def test_a_pool_waits_for_an_engine_that_is_started_again(tmp_path: Path) -> None:
    async with mortal(tmp_path) as server:

        def use() -> None:
            with TeacherPool([server.address], job="test", deadline_s=20) as pool:
                server.engine.hold()
                pending = pool.submit([sequence(9)])
                server.engine.wait_entered()
                server.engine.kill()
                server.engine.let_go()
                assert torch.equal(pending.wait().rows_RD, expected_rows([sequence(9)]))
                assert pool.stats().retries > 0

        await asyncio.to_thread(use)


async def test_an_engine_that_dies_too_often_ends_the_server(tmp_path: Path) -> None:
    async with mortal(tmp_path, restarts=1) as server:
        server.engine.kill()
        await server.until_ready()
        server.engine.kill()
        with pytest.raises(errors.EngineFailure, match=r"process 2 died; .* started again 1 times within 60 s"):
            await server.ended


async def test_a_start_that_fails_is_tried_again_within_the_same_bound(tmp_path: Path) -> None:
    async with mortal(tmp_path, restarts=2) as server:
        server.engine.births = [errors.ConfigError("no memory")]
        server.engine.kill()
        await server.until_ready()
        assert server.engine.num_starts == 3
        server.engine.kill()
        with pytest.raises(errors.EngineFailure, match="process 3 died; the engine was started again 2 times"):
            await server.ended


async def test_without_restarts_a_death_ends_the_server_at_once(tmp_path: Path) -> None:
    async with mortal(tmp_path, restarts=0) as server:
        server.engine.kill()
        with pytest.raises(errors.EngineFailure, match=r"^process 1 died$"):
            await server.ended


async def test_an_engine_that_dies_asleep_sleeps_on_in_its_next_life(tmp_path: Path) -> None:
    async with mortal(tmp_path) as server, client_of(server) as client:
        await client.sleep(EVERY_TAG, drain_s=5)
        server.engine.kill()
        while server.engine.num_starts < 2 or not server.engine.asleep:
            await server.get("/healthz")
        await until_awake(server, client)
        assert torch.equal(
            (await client.prefill([sequence(9)], Deadline.after(10))).rows_RD, expected_rows([sequence(9)])
        )


async def test_an_engine_that_is_started_again_asleep_is_woken_only_when_it_sleeps_again(tmp_path: Path) -> None:
    async with mortal(tmp_path) as server, client_of(server) as client:
        await client.sleep(EVERY_TAG, drain_s=5)
        server.engine.hold_starts()
        server.engine.kill()
        while server.engine.num_starts < 2:
            await server.get("/healthz")
        waking = asyncio.create_task(client.wake(EVERY_TAG))
        with pytest.raises(errors.Unavailable, match="the server's engine died"):
            await waking
        server.engine.let_start()
        while not server.engine.asleep:
            await server.get("/healthz")
        await until_awake(server, client)
        assert server.engine.num_starts == 2


async def until_awake(server: Mortal, client: TeacherClient) -> None:
    """As a pool does, which asks again."""
    async with asyncio.timeout(10):
        while (await server.get("/readyz"))[0] != 200:
            with contextlib.suppress(errors.Unavailable):
                await client.wake(EVERY_TAG)
