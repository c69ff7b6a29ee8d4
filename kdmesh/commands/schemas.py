"""The command that prints a configuration's schema, for editors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from kdmesh.config import StrictModel
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig

CONFIGURATIONS: Mapping[str, type[StrictModel]] = {
    "trainer": TrainerConfig,
    "teacher": TeacherConfig,
    "rollout": RolloutConfig,
}
Json = dict[str, Any]


@click.command()
@click.argument("service", type=click.Choice(list(CONFIGURATIONS)))
def schema(service: str) -> None:
    """Print the JSON Schema of a trainer's or a server's configuration, by which editors complete and explain keys.

    \b
    Example: kdmesh schema trainer > trainer.schema.json
    and as the first line of my.yaml, for editors with yaml-language-server:
    # yaml-language-server: $schema=trainer.schema.json
    """
    click.echo(json.dumps(schema_of(service), indent=1, ensure_ascii=False))


def schema_of(service: str) -> Json:
    """As JSON Schema 2020-12 says; rules between keys are not in it."""
    found: Json = _tidied(CONFIGURATIONS[service].model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"kdmesh {service}", **found}


def _tidied(node: Any) -> Any:
    """Without the titles that pydantic makes of names, and with descriptions in one line."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    texts = {key: value for key, value in node.items() if key in ("title", "description") and isinstance(value, str)}
    tidied = {key: _tidied(value) for key, value in node.items() if key not in texts}
    return tidied | ({"description": " ".join(texts["description"].split())} if "description" in texts else {})
