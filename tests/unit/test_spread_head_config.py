"""What a head that is spread over ranks by tokens goes with, and what is refused before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdmesh.config import load
from kdmesh.errors import ConfigError
from kdmesh.losses import build_divergence, slice_form
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.sections.parallel_config import SPREAD_DIVERGENCES
from tests.support.loss_cases import PARAMS

TREE: dict[str, Any] = {
    "output": "run",
    "student": {"model": "student"},
    "teacher": {"addresses": ["host:1"]},
    "data": {"train": {"format": "chat", "path": "train.jsonl"}},
    "steps": 3,
    "parallel": {"head": "vocabulary"},
}


def loaded(tmp_path: Path, **sections: Any) -> TrainerConfig:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**TREE, **sections}), encoding="utf-8")
    return load(TrainerConfig, path, [])


def test_the_configuration_knows_the_divergences_that_slices_are_enough_for() -> None:
    divergences = {name: build_divergence(name, knobs(0.5)) for name, knobs in PARAMS.items()}
    assert {name for name, divergence in divergences.items() if slice_form(divergence)} == set(SPREAD_DIVERGENCES)


@pytest.mark.parametrize("name", SPREAD_DIVERGENCES)
def test_these_divergences_load(tmp_path: Path, name: str) -> None:
    if name == "sampled_reverse_kl":
        return  # needs a source that samples
    divergence = {"name": name, **PARAMS[name](0.5)}
    assert loaded(tmp_path, objective={"name": "distill", "divergence": divergence}).parallel.head == "vocabulary"


def test_cross_entropy_alone_loads(tmp_path: Path) -> None:
    assert loaded(tmp_path, objective={"name": "sft"}).parallel.head == "vocabulary"


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"objective": {"name": "distill", "divergence": {"name": "adaptive_kl"}}}, "divergence adaptive_kl"),
        ({"objective": {"name": "distill", "keep": {"top_k": 8}}}, "objective.keep"),
        ({"objective": {"name": "distill", "algorithm": {"name": "dskd"}}}, "objective.algorithm dskd"),
        (
            {"objective": {"name": "distill", "divergence": {"name": "custom", "target": "my.losses:own"}}},
            "divergence custom",
        ),
        ({"student": {"model": "student", "lora": {"rank": 4}}}, "student.lora"),
        (
            {
                "teacher": None,
                "teachers": {"a": {"addresses": ["host:1"]}, "b": {"addresses": ["host:2"]}},
                "objective": {"name": "distill", "teacher_weights": {"a": 1, "b": 1}},
            },
            "`teachers`",
        ),
        (
            {
                "data": {
                    "train": {"format": "chat", "path": "train.jsonl"},
                    "teacher_tokenizer": {"path": "teacher"},
                }
            },
            "data.teacher_tokenizer",
        ),
    ],
)
def test_what_needs_the_whole_head_is_refused_by_name(tmp_path: Path, sections: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.head vocabulary does not go with {why}"):
        loaded(tmp_path, **sections)
