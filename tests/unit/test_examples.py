"""Holds that every file in examples/ is a configuration that loads, and names only what its user brings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kdmesh.preflight import check
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_as_the_service_it_is_for(path: Path) -> None:
    kinds = {"teacher": TeacherConfig, "rollout": RolloutConfig}
    kind = kinds.get(path.stem.split("-")[0], TrainerConfig)
    assert isinstance(check.load_any(path), kind)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_lacks_nothing_but_models_data_and_secrets(path: Path) -> None:
    wanted = re.compile(
        r"^(engine\.model|student\.model|data\.[\w.]+\.path|evaluation\.questions\.path|server\.(tls|auth)\.\w+"
        r"|teacher\.access\.[\w.]+): "
    )
    assert all(wanted.match(line) for line in check.missing(check.load_any(path)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_opens_with_what_it_is_for_and_how_to_run_it(path: Path) -> None:
    opening = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert f"examples/{path.name}" in opening


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_whole_configuration_in_the_documents_loads(path: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for index, block in enumerate(blocks):
        tree = yaml.safe_load(block)
        if tree.keys() & {"steps", "epochs"} or "engine" in tree:  # a whole one; others show a section
            (tmp_path / f"{index}.yaml").write_text(block, encoding="utf-8")
            check.load_any(tmp_path / f"{index}.yaml")
