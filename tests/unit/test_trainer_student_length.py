"""A student that cannot compute the longest sequences of the data is refused before anything loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kdmesh.errors import ConfigError
from kdmesh.models.positions import rope_types, safe_limit, stated_limit
from kdmesh_trainer.builders.student_length import refuse_short_student, warn_of_new_positions
from kdmesh_trainer.config import TrainerConfig
from tests.support.tiny_models import FAMILIES, TinyModels

ROPE = {"rope_theta": 1e4, "factor": 4.0}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONGROPE = {**ROPE, **FACTORS, "rope_type": "longrope", "original_max_position_embeddings": 64}


def config_of(student: Path, max_tokens: int) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {
            "output": "run",
            "student": {"model": student},
            "teacher": {"addresses": ["127.0.0.1:1"]},
            "data": {"train": {"format": "chat", "path": "train.jsonl"}, "max_tokens": max_tokens},
            "steps": 1,
        }
    )


@pytest.mark.parametrize(
    ("family", "overrides", "limit", "why"),
    [
        ("gpt2", {}, 256, "has positions for 256 tokens, and for no more$"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 256, "has positions for 256 tokens, and for no more$"),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, 256, "type dynamic, and beyond 256 tokens"),
        ("llama", {"rope_parameters": LONGROPE}, 64, "type longrope, and beyond 64 tokens .* must be at most 64$"),
    ],
)
def test_a_student_that_would_compute_something_else_is_refused(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    overrides: dict[str, Any],
    limit: int,
    why: str,
) -> None:
    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, {}))
    student = tiny_models.path(family, **overrides)
    refuse_short_student(config_of(student, limit))
    with pytest.raises(ConfigError, match=rf"^data\.max_tokens is {limit + 1}; .*{why}"):
        refuse_short_student(config_of(student, limit + 1))


def test_rotary_positions_that_were_not_learnt_are_told_of(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_new_positions(config_of(tiny_models.path(), 256))
        assert not caplog.records
        beyond = config_of(tiny_models.path(), 257)
        refuse_short_student(beyond)
        assert not caplog.records
        warn_of_new_positions(beyond)
    assert [record.message for record in caplog.records] == ["data.max_tokens is beyond the student's positions"]


def test_each_sort_of_layer_counts() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "gemma3_text",
        max_position_embeddings=256,
        layer_types=["full_attention", "sliding_attention"],
        num_hidden_layers=2,
        rope_parameters={"full_attention": LONGROPE, "sliding_attention": plain},
    )
    assert (safe_limit(config), stated_limit(config)) == (64, 256)
    assert rope_types(config) == {"longrope", "default"}
