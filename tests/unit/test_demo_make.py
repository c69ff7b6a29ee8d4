"""`kdmesh demo --make` says what it will not do."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from kdmesh.commands import cli
from kdmesh.demo import ingredients
from kdmesh.demo.live import Live
from kdmesh.demo.plan import BRIEF


def demo(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["demo", *arguments])


@pytest.mark.parametrize(
    "arguments", [("--on-policy",), ("--output", "elsewhere"), ("--cache", "elsewhere"), ("--fresh",)]
)
def test_a_demo_that_only_makes_its_models_refuses_what_it_would_ignore(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = demo("--brief", "--make", str(tmp_path / "made"), *arguments)
    assert result.exit_code == 2
    assert "--make goes with --brief alone" in result.output


def test_a_demo_says_that_its_models_are_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "is there already" in demo("--make", str(tmp_path)).output


def test_models_that_are_of_somebody_else_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    result = demo("--brief", "--make", str(tmp_path))
    assert result.exit_code == 2
    assert f"{tmp_path / 'student'} is not of this demo" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_what_an_interrupted_making_has_copied_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into, making = tmp_path / "made", tmp_path / "made" / "making"
    workspace = SimpleNamespace(teacher_model=making / "teacher", run=making.joinpath, corpus=making / "corpus")
    for path in (workspace.teacher_model, making / "warm-up" / "final", workspace.corpus, into / "teacher"):
        path.mkdir(parents=True)
        (path / "whose").write_text(path.name)
    stage = SimpleNamespace(train_teacher=lambda: None, workspace=workspace, live=Live())
    monkeypatch.setattr(ingredients, "opened", lambda *_, **__: nullcontext(stage))
    monkeypatch.setattr(ingredients, "warm_up", lambda _: None)
    ingredients.make(BRIEF, into)
    assert {path.name: (path / "whose").read_text() for path in into.iterdir()} == {
        "teacher": "teacher",
        "student": "final",
        "data": "corpus",
    }
