"""What the chart renders, by the helm binaries of tools/install_kubernetes_tools.py."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "kdmesh"
GOLDEN = ROOT / "tests" / "helm" / "golden"
GOLDEN_VERSIONS = ("1.27", "1.34")
RELEASE, NAMESPACE = "demo", "research"

Helm = Literal["helm3", "helm4"]


def run_helm(helm: Helm, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command, done. Raises FileNotFoundError with what to do where helm is not installed."""
    binary = ROOT / ".cache" / "kubernetes-tools" / helm
    if not binary.exists():
        raise FileNotFoundError(f"there is no {binary}: run `make kubernetes-tools`")
    return subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=120)


def template(helm: Helm, *more: str, kube_version: str = "1.34") -> subprocess.CompletedProcess[str]:
    """The chart rendered with `more` arguments, well or not."""
    arguments = ("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", f"{kube_version}.0")
    return run_helm(helm, *arguments, *more)


def values_files() -> list[Path]:
    """Values that stand for a whole installation each."""
    return sorted((CHART / "ci").glob("*-values.yaml"))


def golden_files() -> Iterator[tuple[Path, Path, str]]:
    """Each golden file with the values and the version of Kubernetes that it is of."""
    for values in values_files():
        for version in GOLDEN_VERSIONS:
            yield GOLDEN / f"{values.name.removesuffix('-values.yaml')}-{version}.yaml", values, version


def without_files(rendered: str) -> str:
    """Without the objects that only carry the chart's rules and dashboards."""
    objects = rendered.split("\n---\n")
    return "\n---\n".join(one for one in objects if "\nkind: PrometheusRule\n" not in one and "-dashboard-" not in one)
