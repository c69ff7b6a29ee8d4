"""`kdmesh demo --make` says what it will not do."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kdmesh.commands import cli


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
