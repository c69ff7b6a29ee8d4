"""Unpacks programs of Debian's packages into a folder, without installing them.

`python tools/debian_packages.py prometheus|compose FOLDER` needs apt-get, Debian's keys, and amd64.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_MIRROR = "http://deb.debian.org/debian"


@dataclass(frozen=True, slots=True)
class Package:
    """One package, and the SHA-256 of its file."""

    suite: str
    name: str
    version: str
    digest: str


_PACKAGES = {
    "prometheus": (
        Package(
            "bookworm",
            "prometheus",
            "2.42.0+ds-5+deb12u1",
            "81d59a24fce84f7fbe97a45a4f2914b6a5881b5cd1db2a6a0e129e515e1a5f55",
        ),
        Package(
            "bookworm",
            "prometheus-alertmanager",
            "0.25.0-1+b4",
            "4fb9aed15cfe8e0c32408e643ab32a1e41ee87d2cc26f18aeba928b1b0b98ae7",
        ),
    ),
    "compose": (
        Package(
            "trixie",
            "docker-compose",
            "2.26.1-4",
            "47681197cb2b1ab88206b42a1a92fc75f50d9530a6322d03494a473eed0408ea",
        ),
    ),
}


def main(tool: str, into: Path) -> None:
    """Fetch, compare with the pins, unpack."""
    into.mkdir(parents=True, exist_ok=True)
    for package in _PACKAGES[tool]:
        with tempfile.TemporaryDirectory() as folder:
            file = _fetch(package, Path(folder))
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != package.digest:
                sys.exit(f"{file.name} has SHA-256 {found}, not {package.digest}")
            subprocess.run(["dpkg", "-x", str(file), str(into)], check=True)


def _fetch(package: Package, folder: Path) -> Path:
    """With lists of our own: the machine may be of another suite, or have none."""
    for path in ("state/lists/partial", "cache/archives/partial"):
        (folder / path).mkdir(parents=True)
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYS}] {_MIRROR} {package.suite} main\n", encoding="utf-8")
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Sandbox::User": "",  # apt's own user cannot write here
    }
    apt = ["apt-get", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    for command in (["update"], ["download", f"{package.name}={package.version}"]):
        result = subprocess.run([*apt, *command], cwd=folder, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"apt-get {' '.join(command)} failed: {result.stderr}")
    (file,) = folder.glob(f"{package.name}_*.deb")
    return file


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
