"""What the chart renders, as objects."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools.helm_chart import render

Manifest = dict[str, Any]


def ci_values(name: str) -> Path:
    """The file of the values that the chart is tried with, under this name."""
    return render.CHART / "ci" / f"{name}-values.yaml"


@cache
def rendered_text(values: Path, kube_version: str = "1.34", helm: render.Helm = "helm4") -> str:
    """What helm prints for one of the ci values."""
    done = render.template(helm, "--values", str(values), kube_version=kube_version)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def rendered(values: Path, kube_version: str = "1.34") -> tuple[Manifest, ...]:
    """The objects."""
    loaded = yaml.load_all(rendered_text(values, kube_version), Loader=yaml.CSafeLoader)
    return tuple(manifest for manifest in loaded if manifest)


def rendered_with(*settings: str, values: str = "anonymous-cpu") -> tuple[Manifest, ...]:
    """The objects of ci values with some of them set otherwise."""
    more = [part for setting in settings for part in ("--set-json", setting)]
    done = render.template("helm4", "--values", str(ci_values(values)), *more)
    assert done.returncode == 0, done.stderr
    return tuple(one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one)


def refusal(*settings: str, values: str = "anonymous-cpu") -> str:
    """What helm says when it refuses ci values with some of them set otherwise."""
    more = [part for setting in settings for part in ("--set-json", setting)]
    done = render.template("helm4", "--values", str(ci_values(values)), *more)
    assert done.returncode != 0, f"helm took {settings}"
    return done.stderr


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Every pod that the objects make, with the path to it."""
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        yield from _pods_in(manifest, name)


def _pods_in(node: Any, where: str) -> Iterator[tuple[str, Manifest]]:
    if not isinstance(node, dict):
        return
    if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
        metadata = {"name": "pod", **(node.get("metadata") or {})}
        yield where, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": node["spec"]}
        return
    for key, value in node.items():
        yield from _pods_in(value, f"{where}/{key}")


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> list[Manifest]:
    """Those of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def containers(pod: Manifest) -> list[Manifest]:
    """All of a pod, those that end before the others included."""
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
