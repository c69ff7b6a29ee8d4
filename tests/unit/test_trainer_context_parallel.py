"""Which students and ranks can hold rows of tokens together is known before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdmesh.errors import ConfigError
from kdmesh_trainer.builders.context import refuse_unfit_student
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.parallel_config import ParallelConfig
from tests.support.tiny_models import TinyModels
from tests.support.tiny_vision import TinyVisionModels
from tests.support.trainer_ranks import run_ranks


def config_of(student: Path, *, context: int, context_exchange: str = "auto") -> TrainerConfig:
    return TrainerConfig.model_validate(
        {
            "output": "run",
            "student": {"model": student},
            "teacher": {"addresses": ["127.0.0.1:1"]},
            "data": {"train": {"format": "chat", "path": "train.jsonl"}},
            "steps": 1,
            "parallel": {"context": context, "context_exchange": context_exchange},
        }
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({}, "parallel.context is 3 and .* has 4 attention heads; it must divide them, or .*context_exchange be keys"),
        (
            {"num_attention_heads": 6, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of type dynamic, which depend on the longest sequence",
        ),
    ],
)
def test_a_student_that_ranks_cannot_hold_together_is_refused(
    tiny_models: TinyModels, overrides: dict[str, Any], words: str
) -> None:
    student = tiny_models.path("qwen3", **overrides)
    refuse_unfit_student(config_of(student, context=1))
    with pytest.raises(ConfigError, match=words):
        refuse_unfit_student(config_of(student, context=3, context_exchange="heads"))


def test_ranks_that_cannot_share_heads_exchange_keys(tiny_models: TinyModels) -> None:
    for context, heads, exchange in ((2, 14, "heads"), (8, 14, "keys"), (7, 14, "heads")):
        assert ParallelConfig(context=context).exchange(heads) == exchange
    assert ParallelConfig(context=2, context_exchange="keys").exchange(14) == "keys"
    refuse_unfit_student(config_of(tiny_models.path("qwen3"), context=3))


def test_a_student_that_reads_images_is_refused(tiny_vision: TinyVisionModels) -> None:
    with pytest.raises(ConfigError, match="reads images; it must be 1"):
        refuse_unfit_student(config_of(tiny_vision.path(), context=2))


def place(mesh: Mesh) -> list[int]:
    """Where a rank is, and what its group tells each other."""
    context = mesh.context
    assert context is not None
    assert mesh.place_of(mesh.rank) == (mesh.data_group, context.place)
    return [mesh.num_data_groups, mesh.data_group, context.place, *(told[0] for told in context.tell([mesh.rank]))]


@pytest.mark.slow
def test_ranks_that_follow_each_other_are_together() -> None:
    places = run_ranks("tests.unit.test_trainer_context_parallel:place", ranks=4, context=2)
    assert places == [[2, 0, 0, 0, 1], [2, 0, 1, 0, 1], [2, 1, 0, 2, 3], [2, 1, 1, 2, 3]]
