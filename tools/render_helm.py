"""Writes the golden files of the chart's ci values anew, to be read in the diff."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.helm_chart import render


def main() -> None:
    """Render all of them with the newest helm."""
    render.GOLDEN.mkdir(exist_ok=True)
    for old in render.GOLDEN.glob("*.yaml"):
        old.unlink()
    for path, values, version in render.golden_files():
        done = render.template("helm4", "--values", str(values), kube_version=version)
        if done.returncode:
            sys.exit(f"{values.name}: {done.stderr}")
        path.write_text(render.without_files(done.stdout), encoding="utf-8")


if __name__ == "__main__":
    main()
