"""SGLang gives memory back when it knows that it is idle, which is later than its last answer."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest

from kdmesh.errors import EngineFailure
from kdmesh.sglang import sleep
from kdmesh.types import SleepTag


class Engine:
    """Notes what it is told. It ends when it is told to release memory before it has noticed that it is idle."""

    def __init__(self, *, becomes_idle: bool = True) -> None:
        self.told: list[str] = []
        self.tokenizer_manager = self
        self._becomes_idle = becomes_idle
        self._is_idle = False

    async def flush_cache(self, timeout_s: float | None = None) -> SimpleNamespace:
        assert timeout_s, "without a time it does not wait"
        self.told.append("flush")
        self._is_idle = self._becomes_idle
        return SimpleNamespace(success=self._is_idle, message="Timed out waiting for idle state.")

    async def release_memory_occupation(self, request: SimpleNamespace) -> None:
        assert self._is_idle, "release_memory_occupation should be called only when server is idle."
        self.told.append(f"release {' and '.join(request.tags)}")


@pytest.fixture(autouse=True)
def _no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = SimpleNamespace(ReleaseMemoryOccupationReqInput=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", messages)


def test_memory_is_released_once_it_is_idle() -> None:
    engine = Engine()
    asyncio.run(sleep.release(engine, {SleepTag.WEIGHTS, SleepTag.KV_CACHE}))
    assert engine.told == ["flush", "release kv_cache and weights"]


def test_one_that_does_not_become_idle_is_left_as_it_is() -> None:
    engine = Engine(becomes_idle=False)
    with pytest.raises(EngineFailure, match="not idle although it has answered everything: Timed out"):
        asyncio.run(sleep.release(engine, {SleepTag.WEIGHTS}))
    assert engine.told == ["flush"]
