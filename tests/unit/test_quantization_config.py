"""What a student that computes with rounded matrices goes with, and what is refused before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdmesh.config import load
from kdmesh.errors import ConfigError
from kdmesh_trainer.config import TrainerConfig

TREE: dict[str, Any] = {
    "output": "run",
    "student": {"model": "student"},
    "teacher": {"addresses": ["host:1"]},
    "data": {"train": {"format": "chat", "path": "train.jsonl"}},
    "steps": 3,
}
ON_POLICY = {"kind": "on_policy", "rollouts": {"addresses": ["host:2"]}, "sampling": {"max_new_tokens": 8}}


def loaded(tmp_path: Path, quantization: dict[str, Any] | None, **sections: Any) -> TrainerConfig:
    path = tmp_path / "train.yaml"
    student = {"model": "student", "quantization": quantization, **sections.pop("student", {})}
    path.write_text(yaml.safe_dump({**TREE, "student": student, **sections}), encoding="utf-8")
    return load(TrainerConfig, path, [])


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_integers_have_groups_or_none_off_policy_and_on_policy(
    tmp_path: Path, weights: str, group_size: int | None
) -> None:
    told = {"weights": weights, "group_size": group_size}
    for sections in ({}, {"source": ON_POLICY}):
        found = loaded(tmp_path, told, **sections).student.quantization
        assert found is not None and (found.weights, found.group_size) == (weights, group_size)


@pytest.mark.parametrize(
    ("quantization", "sections", "told"),
    [
        ({}, {}, "student.quantization.weights"),
        ({"weights": "int3"}, {}, "int4"),
        ({"weights": "int4", "group_size": 48}, {}, "student.quantization.group_size"),
        ({"weights": "fp8", "group_size": 32}, {}, "weights fp8 has a scale for each row, and group_size is 32"),
        ({"weights": "int4", "activations": "int8"}, {}, "activations int8 needs weights int8, not int4"),
        ({"weights": "int8", "activations": "fp8"}, {}, "activations fp8 needs weights fp8, not int8"),
        ({"weights": "int8", "activations": "int8", "group_size": 64}, {}, "a scale for each row of weights"),
        ({"weights": "int8", "keep": [""]}, {}, "student.quantization.keep"),
        ({"weights": "int8"}, {"student": {"lora": {"rank": 4}}}, "quantization does not go with lora"),
        (
            {"weights": "int8", "activations": "int8"},
            {"source": ON_POLICY},
            "activations int8 does not go with source on_policy",
        ),
        (
            {"weights": "int8"},
            {"teacher": {"addresses": ["host:1"], "follows_student": {}}},
            "student.quantization does not go with teacher.follows_student",
        ),
        (None, {"export": {"matrices": "masters"}}, "export.matrices masters needs student.quantization"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, quantization: dict[str, Any] | None, sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        loaded(tmp_path, quantization, **sections)
