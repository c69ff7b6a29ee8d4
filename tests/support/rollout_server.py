"""A rollout server in the test's own event loop, or as a real process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from kdmesh.rpc.rollouts.client import RolloutClient
from kdmesh.serving.addresses import Addresses
from kdmesh.serving.engine.thread import EngineThread
from kdmesh_rollout.config import FakeEngine, RolloutConfig
from kdmesh_rollout.lifecycle import serve
from tests.support.rollout_engines import ControlledEngine
from tests.support.teacher_process import TeacherProcess, await_ready, started


def rollout_config(**sections: dict[str, Any]) -> RolloutConfig:
    """A small rollout server on free ports, with some keys of its sections replaced."""
    tree: dict[str, dict[str, Any]] = {
        "engine": {"kind": "fake", "vocabulary_size": 60, "max_sequence_tokens": 64, "max_running": 8},
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
        "queue": {},
        "jobs": {},
    }
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return RolloutConfig.model_validate(tree)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRollout:
    """A server that takes requests, and the strings to pull."""

    addresses: Addresses
    engine: ControlledEngine
    stop: asyncio.Event
    ended: asyncio.Task[None]

    @contextlib.asynccontextmanager
    async def client(self, *, job: str = "test") -> AsyncIterator[RolloutClient]:
        """A connected client."""
        client = await RolloutClient.connect(self.addresses.grpc, job=job)
        try:
            yield client
        finally:
            await client.close()

    async def queue(self) -> dict[str, Any]:
        """What REST says of it."""
        async with httpx.AsyncClient() as http:
            found: dict[str, Any] = (await http.get(f"http://{self.addresses.rest}/v1/queue")).json()
        return found

    async def until(self, *, running: int, waiting: int = 0) -> None:
        """Return when so many samples are decoded and wait; each look is a round trip through the server's loop."""
        async with asyncio.timeout(5):
            while True:
                now = await self.queue()
                if (now["running"], now["waiting"]["samples"]) == (running, waiting):
                    return


@contextlib.asynccontextmanager
async def running_rollout(
    make_engine: Callable[[FakeEngine], ControlledEngine] = ControlledEngine, **sections: dict[str, Any]
) -> AsyncIterator[RunningRollout]:
    """A server that takes requests, ended on exit; see rollout_config."""
    config = rollout_config(**sections)
    assert isinstance(config.engine, FakeEngine)
    controlled = make_engine(config.engine)
    thread, stop, loop = EngineThread(), asyncio.Event(), asyncio.get_running_loop()
    ready: asyncio.Future[Addresses] = loop.create_future()
    ended = asyncio.create_task(serve(config, controlled, thread, stop=stop, on_ready=ready.set_result))
    try:
        await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        yield RunningRollout(addresses=ready.result(), engine=controlled, stop=stop, ended=ended)
    finally:
        controlled.let_go()
        stop.set()
        await asyncio.wait((ended,))
        await asyncio.to_thread(thread.close, 5)


@contextlib.contextmanager
def rollout_process(directory: Path, **sections: dict[str, Any]) -> Iterator[TeacherProcess]:
    """A server of its own process that is ready; killed on exit if it still runs."""
    path = directory / f"rollout-{len(list(directory.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(rollout_config(**sections).model_dump(mode="json")), encoding="utf-8")
    with started(directory, "-m", "kdmesh_rollout", str(path)) as process:
        yield await_ready(process)
