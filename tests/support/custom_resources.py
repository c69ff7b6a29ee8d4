"""Holds objects of other projects' kinds against those projects' own definitions, as a cluster would."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import pytest
import yaml
from jsonschema import Draft202012Validator

CRDS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "crds"
FILES = {
    "LeaderWorkerSet": "lws.yaml",
    "ScaledObject": "keda-so.yaml",
    "JobSet": "jobset.yaml",
    "TrainJob": "trainjob.yaml",
    "TrainingRuntime": "ctr.yaml",
}
Json = dict[str, Any]


def errors(manifest: Json) -> list[str]:
    """What is wrong with it: unknown keys too, which a cluster would drop in silence. Knows only kinds of `FILES`."""
    schema = _schema(manifest["kind"], manifest["apiVersion"])
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(manifest)
    ]
    return [*found, *_broken_rules(schema, manifest, "")]


@cache
def _schema(kind: str, api_version: str) -> Json:
    path = CRDS / FILES[kind]
    if not path.is_file():
        pytest.fail(f"there is no {path}: the definitions of {kind} lie in shared/data/crds, beside the repository")
    definition = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)
    group, _, wanted = api_version.partition("/")
    assert definition["spec"]["group"] == group
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == wanted]
    schema: Json = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"x-kubernetes-preserve-unknown-fields": True}
    return _closed(schema)


def _closed(node: Any) -> Any:
    """As JSON schema has it, and closed where Kubernetes only drops what it does not know."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _closed(value) for key, value in node.items() if key not in ("default", "format", "nullable")}
    if node.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["type"] = ["integer", "string"]
    if isinstance(made.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if node.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def _broken_rules(schema: Json, value: Any, where: str) -> Iterator[str]:
    """CEL rules of the definition that the value breaks; those of transitions say nothing of a new object."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
            yield f"{where.removeprefix('.')}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for key, held in value.items():
            part = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(part, dict):
                yield from _broken_rules(part, held, f"{where}.{key}")
    elif isinstance(value, list):
        for index, held in enumerate(value):
            yield from _broken_rules(schema.get("items", {}), held, f"{where}.{index}")
