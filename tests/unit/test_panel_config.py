"""Several teachers: which configurations say who teaches what."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdmesh import config
from kdmesh.errors import ConfigError
from kdmesh_trainer.config import TrainerConfig

TWO = """
output: runs/x
steps: 100
student: {model: models/student}
teachers: {code: {addresses: ["127.0.0.1:1"]}, maths: {addresses: ["127.0.0.1:2"]}}
data: {train: {format: chat, path: train.jsonl}}
"""
COLUMN = "data.teacher_column=teacher"
WEIGHTS = "objective={name: distill, teacher_weights: {code: 3, maths: 1}}"


def load(tmp_path: Path, *overrides: str) -> TrainerConfig:
    path = tmp_path / "my.yaml"
    path.write_text(TWO, encoding="utf-8")
    return config.load(TrainerConfig, path, overrides)


def test_a_column_or_weights_say_whom_a_row_learns_from(tmp_path: Path) -> None:
    assert list(load(tmp_path, COLUMN).all_teachers) == ["code", "maths"]
    assert list(load(tmp_path, WEIGHTS).all_teachers) == ["code", "maths"]
    alone = load(tmp_path, "teachers={code: {addresses: ['127.0.0.1:1']}}")  # nothing to choose from
    assert list(alone.all_teachers) == ["code"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "there are 2 teachers: data.teacher_column must name the column"),
        ([COLUMN, WEIGHTS], "a row has one teacher or all"),
        ([COLUMN, "teacher={addresses: ['127.0.0.1:3']}"], "there are `teacher` and `teachers`; give one of them"),
        ([COLUMN, "teachers={}", "teacher={}"], "data.teacher_column needs `teachers`"),
        ([WEIGHTS, "teachers={}", "teacher={}"], "objective.teacher_weights needs `teachers`"),
        (
            ["objective={name: distill, teacher_weights: {code: 1}}"],
            "names code, and `teachers` code, maths; they must be the same",
        ),
        (["objective={name: distill, teacher_weights: {code: 1, maths: 0}}"], "greater than 0"),
        ([COLUMN, "teachers={a b: {}}"], "teachers.a b"),
        ([COLUMN, "objective={name: sft}"], "`teachers` needs objective distill"),
        (
            [COLUMN, "source={kind: on_policy, colocated: true}", "data.max_tokens=512"],
            "source.colocated takes a single `teacher`",
        ),
        ([COLUMN, "teachers.maths.prefetch=1"], "different prefetch"),
        ([COLUMN, "teachers.code.follows_student={every: 1}"], "teachers.code.follows_student: only a single"),
        ([COLUMN, "data.train={format: custom, target: 'a:b'}"], "teacher_column needs files"),
    ],
)
def test_anything_else_is_refused_with_the_rule(tmp_path: Path, overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, *overrides)
    assert reason in str(refused.value)
