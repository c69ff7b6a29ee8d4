"""Unpacks Debian's packages into a folder, without installing them.

`python tools/debian_packages.py prometheus|compose|kubernetes|node FOLDER` needs apt-get, Debian's keys, and amd64.
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
    is_source: bool = False  # its upstream's tarball


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
    "kubernetes": (
        Package(
            "bookworm",
            "etcd-server",
            "3.4.23-4+b4",
            "3a9445d4560ad6de1c375756b2a17d97713df44cbd20a658c871fe108af7ef5d",
        ),
        Package(
            "bookworm",
            "golang-1.19-go",
            "1.19.8-2",
            "545123039b6c79e75cf2d86528781a825424cf33ce9d3f4513d772d7144cd531",
        ),
        Package(
            "bookworm",
            "golang-1.19-src",
            "1.19.8-2",
            "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
        ),
        Package(
            "bookworm",
            "golang-github-modern-go-reflect2-dev",
            "1.0.2-2",
            "af150a5172cf4c19bb321a53e67103e7fb18d07c1baa1e816a235155265d3948",
        ),
        Package(
            "bookworm",
            "kubernetes",
            "1.20.5+really1.20.2-1.1+deb12u1",
            "b83c0780efb182d928dc63d46488a847f161f04e40a94b96bf5247dd671ecdfc",
            is_source=True,
        ),
    ),
    "node": (
        Package(
            "bookworm",
            "containerd",
            "1.6.20~ds1-1+deb12u3",
            "8669d264eeb0fcdb4a0b1ba436ab88ec5dafde4a66e1278ec279d830db4c2216",
        ),
        Package(
            "bookworm",
            "runc",
            "1.1.5+ds1-1+deb12u1",
            "a00351f8c0318de0b424ecf5cd0fdb69880a89f3511cae4f6fff7de3e57881c5",
        ),
        Package(
            "bookworm",
            "containernetworking-plugins",
            "1.1.1+ds1-3+b5",
            "4cac8143474d1249b19f7b0e80b8d0daaa6dfdaa8bd514bc468d38d4a108099f",
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
            unpack = ["tar", "-xf", str(file), "-C"] if package.is_source else ["dpkg", "-x", str(file)]
            subprocess.run([*unpack, str(into)], check=True)


def _fetch(package: Package, folder: Path) -> Path:
    """With lists of our own: the machine may be of another suite, or have none."""
    for path in ("state/lists/partial", "cache/archives/partial"):
        (folder / path).mkdir(parents=True)
    sources = folder / "sources.list"
    kind = "deb-src" if package.is_source else "deb"
    sources.write_text(f"{kind} [signed-by={_KEYS}] {_MIRROR} {package.suite} main\n", encoding="utf-8")
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Sandbox::User": "",  # apt's own user cannot write here
    }
    apt = ["apt-get", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    fetch = ["source", "--download-only"] if package.is_source else ["download"]
    for command in (["update"], [*fetch, f"{package.name}={package.version}"]):
        result = subprocess.run([*apt, *command], cwd=folder, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"apt-get {' '.join(command)} failed: {result.stderr}")
    (file,) = folder.glob(f"{package.name}_*{'.orig.tar.*' if package.is_source else '.deb'}")
    return file


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
