"""Pods of the chart as processes of this machine: what they mount lies below a directory, and the rest is theirs."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.rendered_chart import Manifest, of_kind
from tests.support.teacher_process import started

Secrets = Mapping[str, Mapping[str, str]]
"""By name: the keys and their values."""


def mount(pod: Manifest, manifests: tuple[Manifest, ...], root: Path, secrets: Secrets | None = None) -> None:
    """Lay what the pod's first container mounts below `root`, where it has it."""
    sources: dict[str, Mapping[str, str]] = {
        f"configMap/{one['metadata']['name']}": one["data"] for one in of_kind(manifests, "ConfigMap")
    }
    sources |= {f"secret/{name}": keys for name, keys in (secrets or {}).items()}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    for one in pod["spec"]["containers"][0]["volumeMounts"]:
        folder = Path(f"{root}{one['mountPath']}")
        folder.mkdir(parents=True, exist_ok=True)
        volume = volumes[one["name"]]
        name = volume.get("configMap", {}).get("name")
        source = f"configMap/{name}" if name else f"secret/{volume.get('secret', {}).get('secretName')}"
        for key, text in sources.get(source, {}).items():
            (folder / key).write_text(here(text, root), encoding="utf-8")


def here(text: str, root: Path, variables: Mapping[str, str] | None = None) -> str:
    """With the paths of a container below `root`, and the variables that Kubernetes fills in."""
    moved = re.sub(r"(?<![\w.])/(etc/kdmesh|run/kdmesh|models)/", rf"{root}/\1/", text)
    return re.sub(r"\$\((\w+)\)", lambda match: (variables or {})[match[1]], moved)


def running(
    pod: Manifest, root: Path, *more: str, variables: Mapping[str, str], environment: Mapping[str, str]
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """The first container's command, with `more` arguments; killed on exit if it still runs."""
    container = pod["spec"]["containers"][0]
    (program,) = container["command"]
    arguments = [here(argument, root, variables) for argument in container["args"]]
    return started(root, str(Path(sys.executable).with_name(program)), *arguments, *more, environment=environment)
