"""Puts the images of teacher server and trainer, by their Dockerfiles, where a node of the tests takes them from.

`python -m tests.node.image`: a Docker daemon of its own builds it, as for `make test-containers`.
"""

from __future__ import annotations

from tests.containers.docker import BASE, ROOT, build_image, building

SAVED = ROOT / ".cache" / "kubernetes-node" / "images.tar"
TEACHER = "kdmesh-teacher:node"
TRAINER = "kdmesh-trainer:node"
PAUSE = "kdmesh-pause:node"  # holds the namespaces of a pod

_IDENTITY = SAVED.with_suffix(".id")


def main() -> None:
    """Build; save if there is something new."""
    with building() as docker:
        for service, tag in (("teacher", TEACHER), ("trainer", TRAINER)):
            build_image(docker, service)
            docker.run("tag", f"kdmesh-{service}", tag)
        docker.run("build", "-t", PAUSE, "-", stdin=f'FROM {BASE}\nCMD ["sleep", "infinity"]\n'.encode())
        built = docker.run("image", "inspect", "--format={{.Id}}", TEACHER, TRAINER, PAUSE)
        if not _IDENTITY.exists() or identity() != built:
            _IDENTITY.unlink(missing_ok=True)
            docker.run("save", "-o", str(SAVED), TEACHER, TRAINER, PAUSE)
            _IDENTITY.write_text(built, encoding="utf-8")


def identity() -> str:
    """Of what lies there; fails when nothing does."""
    return _IDENTITY.read_text("utf-8")


if __name__ == "__main__":
    main()
