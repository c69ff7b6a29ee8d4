"""Unpacks Prometheus, promtool and Alertmanager from Debian's packages into a folder, without installing them.

`python tools/prometheus_env.py FOLDER` needs apt-get with the package lists of Debian 12 on amd64.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

# Version and SHA-256 of each package.
_PACKAGES = {
    "prometheus": ("2.42.0+ds-5+deb12u1", "81d59a24fce84f7fbe97a45a4f2914b6a5881b5cd1db2a6a0e129e515e1a5f55"),
    "prometheus-alertmanager": ("0.25.0-1+b4", "4fb9aed15cfe8e0c32408e643ab32a1e41ee87d2cc26f18aeba928b1b0b98ae7"),
}


def main(into: Path) -> None:
    """Fetch, compare with the pins, unpack."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (version, digest) in _PACKAGES.items():
            subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=folder, check=True, capture_output=True)
            (package,) = Path(folder).glob(f"{name}_*.deb")
            found = hashlib.sha256(package.read_bytes()).hexdigest()
            if found != digest:
                sys.exit(f"{package.name} has SHA-256 {found}, not {digest}")
            subprocess.run(["dpkg", "-x", str(package), str(into)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
