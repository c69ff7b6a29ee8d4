"""Writes deploy/docker/constraints.txt: what the images install, in the versions that this environment has."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "deploy" / "docker" / "constraints.txt"
EXTRAS = ("demo", "jwt", "kubernetes", "lora", "tracing")
# torch has its own line in the images, and brings what belongs to its build.
_LEFT_OUT = {"kdmesh", "torch", "triton"}


def needed(requirements: Iterable[str], extras: tuple[str, ...], found: dict[str, str]) -> dict[str, str]:
    """Versions by name of everything that is required here, added to `found`."""
    for text in requirements:
        requirement = Requirement(text)
        wanted = [extra for extra in ("", *extras) if _applies(requirement, extra)]
        own = requirement.name.lower().replace("_", "-")
        if not wanted or own in found or own in _LEFT_OUT or own.startswith("nvidia-"):
            continue
        try:
            found[own] = distribution(requirement.name).version
        except PackageNotFoundError:
            sys.exit(f"{text} is not installed; install kdmesh[{','.join(EXTRAS)}]")
        needed(requires(requirement.name) or (), tuple(requirement.extras), found)
    return found


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def main() -> None:
    """Write the file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    found = needed([*project["dependencies"], *optional], (), {})
    lines = [f"{name}=={version}" for name, version in sorted(found.items())]
    FILE.write_text("# Made by `make constraints`: the versions that the tests ran with.\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
