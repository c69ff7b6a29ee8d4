"""Builds Kubernetes 1.20, the newest that Debian has the source of, and puts Debian's etcd beside it.

`python tools/build_kubernetes.py FOLDER`, where FOLDER is what `debian_packages.py kubernetes` unpacked. A quarter
of an hour on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_VERSION = "1.20.2"
_PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
_REFLECT = "github.com/modern-go/reflect2"


def main(folder: Path) -> None:
    """Build, keep the programs, and remove the rest."""
    source = folder / f"kubernetes-{_VERSION}"
    # The reflect2 that comes with the source takes wrong addresses of maps under Go 1.18 and newer, so that the server
    # crashes at the first custom resource; Debian's has it mended.
    shutil.rmtree(source / "vendor" / _REFLECT)
    shutil.copytree(folder / "usr/share/gocode/src" / _REFLECT, source / "vendor" / _REFLECT)
    # It copies what it has built by rsync, which need not be here.
    script = source / "hack" / "lib" / "golang.sh"
    script.write_text(script.read_text("utf-8").replace("rsync -pc ", "cp -p "), encoding="utf-8")
    within = source / ".go" / "src" / "k8s.io"
    within.mkdir(parents=True)
    (within / "kubernetes").symlink_to(source)
    go = folder / "usr/lib/go-1.19"
    environment = {
        **os.environ,
        "PATH": f"{go / 'bin'}:{os.environ['PATH']}",
        "GOROOT": str(go),
        "GOPATH": str(source / ".go"),
        "GOPROXY": "off",
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
        "KUBE_GIT_VERSION": f"v{_VERSION}",
        "KUBE_GIT_COMMIT": "debian",
        "KUBE_GIT_TREE_STATE": "clean",
    }
    wanted = " ".join(f"cmd/{name}" for name in _PROGRAMS)
    subprocess.run(["make", f"WHAT={wanted}"], cwd=source, env=environment, check=True)
    for name in _PROGRAMS:
        shutil.copy(source / "_output" / "bin" / name, folder / name)
    shutil.copy(folder / "usr" / "bin" / "etcd", folder / "etcd")
    for path in (source, folder / "usr", folder / "etc", folder / "lib"):
        subprocess.run(["rm", "-rf", str(path)], check=True)  # some of it cannot be written, which rmtree minds


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
