"""Puts the image of the teacher server, by its Dockerfile, where a node of the tests takes it from.

`python -m tests.node.image`: a Docker daemon of its own builds it, as for `make test-containers`.
"""

from __future__ import annotations

from tests.containers.docker import BASE, ROOT, build_image, building

SAVED = ROOT / ".cache" / "kubernetes-node" / "images.tar"
TEACHER = "kdmesh-teacher:node"
PAUSE = "kdmesh-pause:node"  # holds the namespaces of a pod

_IDENTITY = SAVED.with_suffix(".id")


def main() -> None:
    """Build; save if there is something new."""
    with building() as docker:
        build_image(docker, "teacher")
        docker.run("tag", "kdmesh-teacher", TEACHER)
        docker.run("build", "-t", PAUSE, "-", stdin=f'FROM {BASE}\nCMD ["sleep", "infinity"]\n'.encode())
        built = docker.run("image", "inspect", "--format={{.Id}}", TEACHER, PAUSE)
        if not _IDENTITY.exists() or identity() != built:
            _IDENTITY.unlink(missing_ok=True)
            docker.run("save", "-o", str(SAVED), TEACHER, PAUSE)
            _IDENTITY.write_text(built, encoding="utf-8")


def identity() -> str:
    """Of what lies there; fails when nothing does."""
    return _IDENTITY.read_text("utf-8")


if __name__ == "__main__":
    main()
