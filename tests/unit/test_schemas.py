"""Schemas of configurations that editors hold files against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from kdmesh.commands.cli import main
from kdmesh.commands.schemas import CONFIGURATIONS, schema_of
from tools import generate_configuration

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def service_of(example: Path) -> str:
    kind = example.stem.partition("-")[0]
    return kind if kind in CONFIGURATIONS else "trainer"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_what_its_schema_says(example: Path) -> None:
    Draft202012Validator(schema_of(service_of(example))).validate(yaml.safe_load(example.read_text()))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"optimizer": {"learning_rat": 1.0}}, "learning_rat"),
        ({"optimizer": {"schedule": "wavy"}}, "wavy"),
        ({"batch": {"sequences": 0}}, "0 is less than the minimum of 1"),
    ],
)
def test_what_a_schema_does_not_know_is_marked(keys: dict[str, Any], words: str) -> None:
    known = {"output": "runs/x", "student": {"model": "m"}, "data": {"train": {"format": "chat", "path": "x.jsonl"}}}
    validator = Draft202012Validator(schema_of("trainer"))
    validator.validate(known | {"optimizer": {"schedule": "wsd"}})
    [error] = validator.iter_errors(known | keys)
    assert words in error.message


@pytest.mark.parametrize("service", CONFIGURATIONS)
def test_every_key_is_explained(service: str) -> None:
    printed = CliRunner().invoke(main, ["schema", service])
    schema = json.loads(printed.output)
    assert printed.exit_code == 0 and schema == schema_of(service)
    Draft202012Validator.check_schema(schema)
    assert [key for key, value in keys_of(schema) if not {"description", "const", "$ref"} & value.keys()] == []
    assert [
        name for name, section in schema["$defs"].items() if "properties" in section and "description" not in section
    ] == []


def test_the_page_of_all_keys_is_up_to_date() -> None:
    assert generate_configuration.PAGE.read_text("utf-8") == generate_configuration.page(), "run `make configuration`"


def keys_of(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for section in [schema, *schema["$defs"].values()]:
        yield from section.get("properties", {}).items()
