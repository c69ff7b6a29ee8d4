"""The rules and dashboards of the chart, and what is known of the metrics that they ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import yaml

from tools import generate_metrics

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "helm" / "kdmesh" / "files"
PROMTOOL = ROOT / ".cache" / "prometheus" / "usr" / "bin" / "promtool"
_METRIC = re.compile(r"(?<![$\w])kdmesh_\w+(?::\w+)*")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def rules() -> list[Mapping[str, Any]]:
    """Recorded series and alerts, in the order that they are evaluated in."""
    trees = [yaml.safe_load((FILES / "rules" / f"{name}.yaml").read_text("utf-8")) for name in ("recording", "alerts")]
    return [rule for tree in trees for group in tree["groups"] for rule in group["rules"]]


def alerts() -> set[str]:
    """Names of alerts."""
    return {rule["alert"] for rule in rules() if "alert" in rule}


def dashboards() -> dict[str, Mapping[str, Any]]:
    """By name."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((FILES / "dashboards").glob("*.json"))}


def panel_queries() -> Iterator[tuple[str, str]]:
    """Where each query is, and the query as Grafana sends it when everything is chosen."""
    for name, dashboard in dashboards().items():
        chosen = {variable["name"]: variable.get("allValue", "") for variable in dashboard["templating"]["list"]}
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                where = f"{name}: {panel['title']} {target['refId']}"
                yield where, Template(target["expr"]).substitute(chosen)


def metrics_of(expr: str) -> set[str]:
    """Names of our metrics in a query."""
    return set(_METRIC.findall(expr)) - {"kdmesh_job"}


@cache
def known_metrics() -> frozenset[str]:
    """Everything that the services show and the rules record."""
    rows = [row for service in ("teacher", "rollout", "trainer") for row in generate_metrics.rows(service)]
    shown = {row.name + suffix for row in rows for suffix in _SUFFIXES.get(row.kind, ("",))}
    return frozenset(shown | {rule["record"] for rule in rules() if "record" in rule})
