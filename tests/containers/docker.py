"""A Docker daemon of the tests' own, which leaves the machine's network alone, and what the images are built on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "containers"
COMPOSE = ROOT / ".cache" / "compose" / "usr" / "libexec" / "docker" / "cli-plugins" / "docker-compose"
BASE = "python:3.11.14-slim-bookworm"
PROMETHEUS = "prom/prometheus:v3.5.0"
SERVICES = ("teacher", "rollout", "trainer")

_CLIENT = "/usr/bin/docker"  # of the package that has dockerd; another one may lack what builds
_NAMESPACE = "kdmesh-containers"
_READY_S = 60.0


class Docker:
    """A daemon that answers."""

    def __init__(self, socket: Path) -> None:
        self._env = {**os.environ, "DOCKER_HOST": f"unix://{socket}", "DOCKER_BUILDKIT": "1"}

    def run(self, *arguments: str, stdin: bytes | None = None) -> str:
        """What `docker ...` prints; fails with what it says."""
        return self._call([_CLIENT, *arguments], stdin=stdin)

    def compose(self, *arguments: str, **env: str) -> str:
        """What `docker compose ...` prints, of the project's file."""
        return self._call([str(COMPOSE), "--project-directory", str(ROOT), *arguments], **env)

    def succeeds(self, *arguments: str) -> bool:
        """Whether `docker ...` does."""
        return subprocess.run([_CLIENT, *arguments], env=self._env, capture_output=True).returncode == 0

    def _call(self, command: Sequence[str], stdin: bytes | None = None, **env: str) -> str:
        result = subprocess.run(command, env={**self._env, **env}, input=stdin, capture_output=True, cwd=ROOT)
        said = result.stdout.decode(errors="replace")
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr.decode(errors='replace')}{said}"
        return said


@contextmanager
def building() -> Iterator[Docker]:
    """A daemon whose builds use the machine's network, and which has no network for containers."""
    with _daemon([], "--bridge=none", "--iptables=false", "--ip-masq=false") as docker:
        yield docker


@contextmanager
def running() -> Iterator[Docker]:
    """A daemon in a network namespace of its own: its bridges and rules of the firewall end with it."""
    subprocess.run(["ip", "netns", "add", _NAMESPACE], check=True)
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["ip", "netns", "delete", _NAMESPACE], check=True)
        subprocess.run(["ip", "-n", _NAMESPACE, "link", "set", "lo", "up"], check=True)
        yield stack.enter_context(_daemon(["nsenter", f"--net=/run/netns/{_NAMESPACE}"]))


@contextmanager
def _daemon(prefix: Sequence[str], *options: str) -> Iterator[Docker]:
    """It keeps images and steps of builds in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (CACHE / "dockerd.log").open("ab") as log:
        place = Path(folder)  # short: a path of a socket must be
        own = [f"--data-root={CACHE / 'data'}", f"--exec-root={place / 'exec'}", f"--pidfile={place / 'pid'}"]
        command = [*prefix, "dockerd", *own, "-H", f"unix://{place / 'socket'}", *options]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            docker = Docker(place / "socket")
            deadline_s = time.monotonic() + _READY_S
            while not docker.succeeds("version"):
                assert process.poll() is None, f"dockerd has ended; see {CACHE / 'dockerd.log'}"
                assert time.monotonic() < deadline_s, "dockerd does not answer"
            yield docker
        finally:
            process.terminate()
            process.wait()
            # It leaves the namespace of the network mounted that containers of the host's network were in.
            mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
            for mount in (mount for mount in mounted if mount.startswith(f"{place}/")):
                subprocess.run(["umount", mount], check=True)


def build(docker: Docker) -> None:
    """All images."""
    for service in SERVICES:
        build_image(docker, service)
    if not docker.succeeds("image", "inspect", PROMETHEUS) and not docker.succeeds("pull", PROMETHEUS):
        _stand_in_prometheus(docker)


def build_image(docker: Docker, service: str) -> None:
    """One of them. `KDMESH_TORCH_INDEX` names another place of torch for CPUs than PyTorch's own."""
    if not docker.succeeds("image", "inspect", BASE) and not docker.succeeds("pull", BASE):
        _stand_in_base(docker)
    index = os.environ.get("KDMESH_TORCH_INDEX")
    arguments = [] if index is None else ["--build-arg", f"TORCH_INDEX={index}"]
    file = f"deploy/docker/{service}.Dockerfile"
    docker.run("build", "--network=host", "-f", file, "-t", f"kdmesh-{service}", *arguments, ".")


def _stand_in_base(docker: Docker) -> None:
    """Where Docker Hub cannot be reached: Debian's Python, under the name of the real one."""
    sys.stderr.write(f"{BASE} cannot be pulled; Debian's packages stand in for it\n")
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        packages = "python3,python3-venv,python3-pip,ca-certificates"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder]
        subprocess.run([*command, "http://deb.debian.org/debian"], check=True, stdout=subprocess.DEVNULL)
        # Whoever signs for the registries here must be believed there too.
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", f"{folder}/etc/ssl/certs/ca-certificates.crt")
        tar = subprocess.run(["tar", "-C", folder, "-c", "."], check=True, capture_output=True).stdout
    docker.run("import", "-", BASE, stdin=tar)


def _stand_in_prometheus(docker: Docker) -> None:
    """The same: Debian's Prometheus."""
    sys.stderr.write(f"{PROMETHEUS} cannot be pulled; Debian's stands in for it\n")
    dockerfile = f"""
FROM {BASE}
COPY prometheus /bin/prometheus
RUN install -d -o 65534 -g 65534 /prometheus /etc/prometheus
USER 65534
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        shutil.copy(ROOT / ".cache" / "prometheus" / "usr" / "bin" / "prometheus", folder)
        (Path(folder) / "Dockerfile").write_text(dockerfile, encoding="utf-8")
        docker.run("build", "--network=host", "-t", PROMETHEUS, folder)
