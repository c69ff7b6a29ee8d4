"""Two teachers, three jobs of two ranks each, and what these jobs learn undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.world import World
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_chats
from tests.system.processes import Processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A drill is several runs of several processes."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def world(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With its undisturbed records."""
    data = tmp_path_factory.mktemp("data")
    write_chats(data / "train.jsonl", 30, seed=1)
    write_chats(data / "held_out.jsonl", 5, seed=2)
    with Processes() as processes:
        world = World(processes, tmp_path_factory.mktemp("chaos"), tiny_models, data)
        world.learn_undisturbed()
        yield world
