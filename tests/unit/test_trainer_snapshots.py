"""The best student is the one that an evaluation has found so, also over several attempts at a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from kdmesh.errors import CheckpointError
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.questions.estimate import Estimate
from kdmesh_trainer.questions.scores import AnswerScores
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.saving.snapshots import ModelSnapshots
from kdmesh_trainer.sections.export_config import BestFigure
from kdmesh_trainer.stats import Scores


class Exporter:
    """Writes the notes alone."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, path: Path, *, notes: Mapping[str, Mapping[str, object]]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for name, note in notes.items():
            (path / name).write_text(json.dumps(note))
        self.written.append(path.name)


class OneRank:
    def on_first(self, call: Any) -> Any:
        return call()


def snapshots(output: Path, best: BestFigure | None, judged_by: str = "a") -> tuple[ModelSnapshots, Exporter]:
    exporter = Exporter()
    found = ModelSnapshots(
        cast(HuggingFaceExporter, exporter), output, best=best, judged_by=judged_by, mesh=cast(Mesh, OneRank())
    )
    return found, exporter


def scores(kl: float | None, cross_entropy: float = 1.0) -> Scores:
    return Scores(
        kl_nats_per_token=kl,
        cross_entropy_nats_per_token=cross_entropy,
        top1_agreement=None,
        num_loss_tokens=1,
        num_sequences=1,
    )


def answers(accuracy: float) -> AnswerScores:
    return AnswerScores(
        accuracy=Estimate(mean=accuracy, standard_error=None),
        pass_at={},
        cut_off_fraction=0.0,
        response_tokens_mean=1.0,
        num_questions=1,
        num_samples=1,
        grader_errors=0,
    )


def note(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "best" / "kdmesh.json").read_text())
    return found


def judge(output: Path, best: BestFigure, values: Mapping[int, float], judged_by: str = "a") -> list[str]:
    """What one attempt at a run writes."""
    found, exporter = snapshots(output, best, judged_by)
    for done, value in values.items():
        match best:
            case "accuracy":
                found.judged(done=done, scores=None, answers=answers(value))
            case "kl_nats_per_token":
                found.judged(done=done, scores=scores(value, -value), answers=None)
            case _:
                found.judged(done=done, scores=scores(None, value), answers=None)
    return exporter.written


@pytest.mark.parametrize(
    ("best", "values", "kept"),
    [
        ("kl_nats_per_token", {1: 2.0, 2: 1.0, 3: 1.5}, {"step": 2, "kl_nats_per_token": 1.0}),
        ("cross_entropy_nats_per_token", {1: 2.0, 2: 3.0}, {"step": 1, "cross_entropy_nats_per_token": 2.0}),
        ("accuracy", {1: 0.0, 2: 0.5, 3: 0.5}, {"step": 2, "accuracy": 0.5}),
        ("kl_nats_per_token", {1: float("nan"), 2: 1.0, 3: float("nan")}, {"step": 2, "kl_nats_per_token": 1.0}),
    ],
)
def test_the_first_of_the_best_students_is_kept(
    best: BestFigure, values: dict[int, float], kept: dict[str, float], tmp_path: Path
) -> None:
    judge(tmp_path, best, values)
    assert note(tmp_path) == {**kept, "judged_by": "a"}


def test_what_an_earlier_attempt_kept_counts(tmp_path: Path) -> None:
    assert judge(tmp_path, "kl_nats_per_token", {2: 1.0}) == ["best"]
    checkpoint(tmp_path)
    assert judge(tmp_path, "kl_nats_per_token", {2: 1.0, 4: 1.2}) == []
    assert judge(tmp_path, "kl_nats_per_token", {6: 0.9}) == ["best"]
    assert note(tmp_path)["step"] == 6
    # It says nothing of another figure.
    assert judge(tmp_path, "accuracy", {8: 0.1}) == ["best"]


def checkpoint(output: Path) -> None:
    (output / "checkpoints" / "step-00000002").mkdir(parents=True)


@pytest.mark.parametrize(
    ("left", "step", "writes"),
    [
        ({"best": 2, "best.writing": 4}, 2, []),  # killed while it wrote
        ({"best.replaced": 2, "best.writing": 4}, 4, []),  # between two names
        ({"best": 4, "best.replaced": 2}, 4, []),  # before the old one was removed
        ({"best.writing": 4}, 6, ["best"]),  # while it wrote the first one
    ],
)
def test_of_what_a_kill_left_the_newest_that_is_whole_counts(
    left: dict[str, int], step: int, writes: list[str], tmp_path: Path
) -> None:
    checkpoint(tmp_path)
    for name, of_step in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "kdmesh.json").write_text(
            json.dumps({"step": of_step, "kl_nats_per_token": 1.0, "judged_by": "a"})
        )
    assert judge(tmp_path, "kl_nats_per_token", {6: 1.5}) == writes
    assert note(tmp_path)["step"] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]


def test_what_was_judged_by_something_else_does_not_count(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    assert judge(tmp_path, "kl_nats_per_token", {2: 1.0}) == ["best"]
    assert judge(tmp_path, "kl_nats_per_token", {4: 2.0, 6: 2.1, 8: 1.9}, judged_by="b") == ["best", "best"]
    assert note(tmp_path) == {"step": 8, "kl_nats_per_token": 1.9, "judged_by": "b"}


def test_what_a_run_kept_of_which_no_checkpoint_is_there_does_not_count(tmp_path: Path) -> None:
    assert judge(tmp_path, "kl_nats_per_token", {2: 1.0}) == ["best"]
    assert judge(tmp_path, "kl_nats_per_token", {1: 3.0, 2: 4.0, 3: 2.0}) == ["best", "best"]
    assert note(tmp_path)["step"] == 3


def test_a_record_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    judge(tmp_path, "accuracy", {1: 0.5})
    (tmp_path / "best" / "kdmesh.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"best/kdmesh\.json, which says how good .* cannot be read"):
        judge(tmp_path, "accuracy", {2: 0.6})


def test_none_is_kept_where_none_is_wanted_and_others_have_the_number_of_their_step(tmp_path: Path) -> None:
    found, exporter = snapshots(tmp_path, None)
    found.judged(done=1, scores=scores(1.0), answers=None)
    found.write(done=20)
    assert exporter.written == ["step-00000020"]
    assert json.loads((tmp_path / "models" / "step-00000020" / "kdmesh.json").read_text()) == {"step": 20}


@pytest.mark.parametrize(
    ("best", "sections", "refused"),
    [
        ("accuracy", {}, "best accuracy needs evaluation.questions"),
        ("kl_nats_per_token", {}, "best kl_nats_per_token needs data.held_out"),
        ("cross_entropy_nats_per_token", {}, "best cross_entropy_nats_per_token needs data.held_out"),
        (
            "kl_nats_per_token",
            {
                "data": {
                    "train": {"format": "chat", "path": "a.jsonl"},
                    "held_out": {"format": "chat", "path": "b.jsonl"},
                }
            },
            "needs a `teacher`",
        ),
    ],
)
def test_a_figure_that_no_evaluation_has_is_refused(best: str, sections: dict[str, Any], refused: str) -> None:
    tree = {
        "output": "run",
        "student": {"model": "student"},
        "objective": {"name": "sft"},
        "data": {"train": {"format": "chat", "path": "a.jsonl"}},
        "steps": 3,
        "export": {"best": best},
    }
    with pytest.raises(ValueError, match=refused):
        TrainerConfig.model_validate(tree | sections)
