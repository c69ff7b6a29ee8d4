"""The schemas that a cluster holds objects against: Kubernetes' own, and those of custom resources."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cel
import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import utils

CRDS = Path(os.environ.get("KDMESH_CRDS", Path(__file__).parents[3] / "shared/data/crds"))
"""Where the definitions of custom resources lie; tests that need them skip where it is not there."""

_FILES = {
    "JobSet": "jobset.yaml",
    "LeaderWorkerSet": "lws.yaml",
    "ScaledObject": "keda-so.yaml",
    "TrainJob": "trainjob.yaml",
    "TrainingRuntime": "ctr.yaml",  # of the cluster-wide kind, whose spec is the same
}
CUSTOM = frozenset(_FILES)
"""Kinds that are known by their definitions."""

VERSIONS = ("1.29", "1.31", "1.34", "1.37")

utils.schema_contents = cache(utils.schema_contents)  # it reads the same megabytes anew for every object


def problems(manifest: Mapping[str, Any], version: str = VERSIONS[-1]) -> list[str]:
    """What is wrong with an object, strictly: an unknown key is, too. None for a kind whose schema is not there."""
    if manifest["kind"] in _FILES:
        if not CRDS.is_dir():
            return []
        schema = _definition(manifest["kind"])
        spec = {key: value for key, value in manifest.items() if key in ("spec", "status")}
        errors = _custom(manifest["kind"]).iter_errors(spec)
        found = [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
        return [*found, *_broken_rules(schema, manifest, "")]
    try:
        kubernetes_validate.validate(dict(manifest), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def pod_templates(value: object) -> Iterator[dict[str, Any]]:
    """Every pod inside an object, however deep, as a Pod of its own."""
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            metadata = {"name": "pod", **value.get("metadata", {})}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": value["spec"]}
            return
        for one in value.values():
            yield from pod_templates(one)
    elif isinstance(value, list):
        for one in value:
            yield from pod_templates(one)


@cache
def _definition(kind: str) -> dict[str, Any]:
    definition = yaml.load((CRDS / _FILES[kind]).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    (stored,) = (version for version in definition["spec"]["versions"] if version["storage"])
    schema: dict[str, Any] = stored["schema"]["openAPIV3Schema"]
    return schema


def _broken_rules(schema: Mapping[str, Any], value: object, where: str) -> Iterator[str]:
    """CEL rules that the value breaks; those of changes say nothing of a new object."""
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


@cache
def _custom(kind: str) -> Draft202012Validator:
    schema = _definition(kind)
    wanted = {name: _closed(schema["properties"][name]) for name in ("spec", "status") if name in schema["properties"]}
    return Draft202012Validator({"type": "object", "properties": wanted})


def _closed(schema: Any) -> Any:
    """As an API server means it: unknown keys are refused, an int-or-string is either, what is nullable may be null."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed["type"] = ["integer", "string"]
    elif "properties" in schema and isinstance(schema["properties"], dict) and schema.get("type") == "object":
        keeps = schema.get("x-kubernetes-preserve-unknown-fields", False)
        if not keeps and "additionalProperties" not in schema:
            closed["additionalProperties"] = False
    return closed
