"""Undisturbed jobs, which the disturbed ones are held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_chats
from tests.system.processes import Processes
from tests.system.teachers import Teacher
from tests.system.training import Job, Recipe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several processes that import torch at the same time take long where the cores are not theirs alone."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(400))


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """Directories that jobs are made of."""

    teacher: Path
    data: Path
    plain: Recipe
    other: Recipe  # another architecture, size and objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """A job of each recipe that had a teacher for itself, and the teachers."""

    teacher: Teacher  # still serves
    spare: Teacher  # of the same model
    plain: Job  # materials.plain
    plain_requests: int  # that it asked of its teacher
    other: Job  # materials.other


@pytest.fixture(scope="session")
def materials(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """A teacher, two students and data; the heads are padded differently, the tokenizer is the same."""
    data = tmp_path_factory.mktemp("data")
    write_chats(data / "train.jsonl", 30, seed=1)
    write_chats(data / "held_out.jsonl", 5, seed=2)
    return Materials(
        teacher=tiny_models.path("qwen3", seed=2, hidden_size=48, vocab_size=336),
        data=data,
        plain=Recipe(
            student=tiny_models.path("qwen3", seed=1), data=data, objective={"divergence": {"name": "forward_kl"}}
        ),
        other=Recipe(
            student=tiny_models.path("llama", seed=3, hidden_size=24, vocab_size=352),
            data=data,
            objective={"divergence": {"name": "jensen_shannon", "beta": 0.3}, "ce_weight": 0.2, "temperature": 2.0},
            is_judged=True,
        ),
    )


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Processes that end with the module."""
    with Processes() as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    """Both recipes, each with a teacher of its own; the teachers serve until the end of the session."""
    root = tmp_path_factory.mktemp("undisturbed")
    with Processes() as started:
        teacher, spare = (Teacher(started, root / name, materials.teacher) for name in ("teacher", "spare"))
        plain = Job(started, root / "plain", materials.plain, teacher.address)
        other = Job(started, root / "other", materials.other, spare.address)
        teacher.start()
        spare.start()
        for job in [plain.start(), other.start()]:
            job.succeed()
        yield Undisturbed(
            teacher=teacher,
            spare=spare,
            plain=plain,
            plain_requests=teacher.num_answered("plain"),
            other=other,
        )
