"""Generates kdmesh/v1 from proto/kdmesh/v1, or with --check says whether it is up to date."""

from __future__ import annotations

import filecmp
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "proto").rglob("*.proto"))


def generate(into: Path) -> None:
    """Write messages, service stubs and their type stubs below `into`."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # protoc-gen-mypy lies there
    well_known = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={ROOT / 'proto'}",
            f"--proto_path={well_known}",
            f"--python_out={into}",
            f"--mypy_out={into}",
            f"--grpc_python_out={into}",
            f"--mypy_grpc_out={into}",
            *(str(path) for path in SOURCES),
        ]
    )
    if status:
        sys.exit(f"protoc failed with status {status}")


def stale_files() -> list[str]:
    """Generated files that differ from what the protos now give."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = sorted(path.relative_to(folder) for path in Path(folder).rglob("*.py*"))
        return [str(p) for p in made if not _same(Path(folder) / p, ROOT / p)]


def _same(made: Path, committed: Path) -> bool:
    return committed.exists() and filecmp.cmp(made, committed, shallow=False)


def main() -> None:
    """Generate, or check with --check."""
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
    elif stale := stale_files():
        sys.exit(f"out of date, run `make proto`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
