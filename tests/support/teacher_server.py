"""A teacher server in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.engine.thread import EngineThread
from kdmesh_teacher.config import FakeEngine, TeacherConfig
from kdmesh_teacher.engine import Engine
from kdmesh_teacher.lifecycle import serve
from tests.support.teacher_engines import ControlledEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTeacher:
    """A server that listens, and the strings to pull."""

    addresses: Addresses
    engine: ControlledEngine
    stop: asyncio.Event
    ended: asyncio.Task[None]

    @contextlib.asynccontextmanager
    async def client(self, *, job: str = "test", door: DoorChoice = "stream") -> AsyncIterator[TeacherClient]:
        """A connected client."""
        client = await TeacherClient.connect(self.addresses.grpc, SessionOptions(job=job, door=door))
        try:
            yield client
        finally:
            await client.close()


def teacher_config(**sections: dict[str, Any]) -> TeacherConfig:
    """A small teacher on free ports, with some keys of its sections replaced."""
    tree: dict[str, dict[str, Any]] = {
        "engine": {"kind": "fake", "hidden_size": 8, "vocabulary_size": 60, "max_batch_tokens": 256},
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
        "slab": {"slots": 4, "slot_mib": 0.0625, "slots_per_session": 4},
        "queue": {},
        "cache": {},
        "jobs": {},
    }
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return TeacherConfig.model_validate(tree)


@contextlib.asynccontextmanager
async def running_teacher(
    directory: Path, *, wait_ready: bool = True, held: bool = False, **sections: dict[str, Any]
) -> AsyncIterator[RunningTeacher]:
    """A server, ended on exit.

    Args:
        directory: for its socket.
        wait_ready: yield only when it takes requests.
        held: its engine is held from the start, so that it stays loading.
        sections: see `teacher_config`.
    """
    config = teacher_config(**sections)
    assert isinstance(config.engine, FakeEngine)
    engine = ControlledEngine(config.engine)
    if held:
        engine.hold()
    async with served(config, engine, directory, wait_ready=wait_ready) as (addresses, stop, ended):
        try:
            yield RunningTeacher(addresses=addresses, engine=engine, stop=stop, ended=ended)
        finally:
            engine.let_go()


@contextlib.asynccontextmanager
async def served(
    config: TeacherConfig, engine: Engine, directory: Path, *, wait_ready: bool = True
) -> AsyncIterator[tuple[Addresses, asyncio.Event, asyncio.Task[None]]]:
    """Any engine behind a server: where it listens, what stops it, and its end."""
    thread, stop, loop = EngineThread(), asyncio.Event(), asyncio.get_running_loop()
    listening: asyncio.Future[Addresses] = loop.create_future()
    ready: asyncio.Future[Addresses] = loop.create_future()
    ended = asyncio.create_task(
        serve(
            config,
            engine,
            thread,
            directory=directory,
            stop=stop,
            on_listen=listening.set_result,
            on_ready=ready.set_result,
        )
    )
    try:
        await asyncio.wait((ended, ready if wait_ready else listening), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        yield listening.result(), stop, ended
    finally:
        stop.set()
        await asyncio.wait((ended,))
        await asyncio.to_thread(thread.close, 5)


async def num_waiting(teacher: RunningTeacher) -> int:
    """Requests that wait for a slot."""
    async with httpx.AsyncClient() as rest:
        slab = (await rest.get(f"http://{teacher.addresses.rest}/v1/slab")).json()
    return int(slab["waiting"]["requests"])
