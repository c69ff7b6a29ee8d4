"""On shared devices a rank has given back what it does not use before anybody is woken."""

from __future__ import annotations

from collections.abc import Callable, Set
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kdmesh.types import EVERY_TAG, SleepTag
from kdmesh_trainer import devices
from kdmesh_trainer.devices import SharedDevices
from kdmesh_trainer.mesh import Mesh


class _Servers:
    """Who notes what it is told."""

    def __init__(self, noted: list[str]) -> None:
        self._noted = noted

    def sleep(self, tags: Set[SleepTag] = EVERY_TAG) -> None:
        self._noted.append("servers")

    def wake(self, *, within_s: float | None = None) -> None:
        self._noted.append("servers")


@pytest.mark.parametrize("turn", [SharedDevices.publish, SharedDevices.sample, SharedDevices.score])
def test_every_rank_gives_its_freed_memory_back_before_servers_are_told_anything(
    turn: Callable[[SharedDevices], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []

    def gather(value: Any) -> list[Any]:
        noted.append("every rank")
        return [value]

    mesh = SimpleNamespace(device=torch.device("cpu"), gather=gather, on_first=lambda call: call())
    monkeypatch.setattr(devices, "give_back_memory", lambda device: noted.append(f"freed on {device}"))
    turn(SharedDevices(_Servers(noted), _Servers(noted), cast(Mesh, mesh)))
    assert noted == ["freed on cpu", "every rank", "servers", "servers"]
