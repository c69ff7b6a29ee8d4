"""GPUs and RDMA adapters, as this process sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from kdmesh.doctor.finding import Finding, ok
from kdmesh.launch import local

_DRIVER = Path("/proc/driver/nvidia/version")
_ADAPTERS = Path("/sys/class/infiniband")
_VERBS = Path("/dev/infiniband")
_BY_STREAM = "rows from teachers on other nodes come as a stream, which costs the processors of both sides"


def devices(adapters: Path = _ADAPTERS, verbs: Path = _VERBS) -> Iterator[Finding]:
    """GPUs, then RDMA."""
    yield _gpus()
    yield _rdma(adapters, verbs)
    yield _transports()


def _gpus() -> Finding:
    given = local.num_gpus()
    seen, why = _seen_by_torch()
    if given and seen == given:
        return ok("GPUs", f"{seen}, of {_driver()}", part="gpu")
    if given and not seen:
        return Finding(
            name="GPUs",
            verdict="missing",
            found=f"this process has {given}, and torch can use none: {why}",
            cost="everything that could run on them runs on the CPU, or refuses to start",
            cure="a torch that is built for CUDA, and a driver that is as new as it wants",
            part="gpu",
        )
    if given or seen:
        return ok("GPUs", f"torch can use {seen}, of {given} device files", part="gpu")
    return Finding(
        name="GPUs",
        verdict="worse",
        found="none",
        cost="models are computed on the CPU: right for tests and demos",
        cure="a machine with GPUs; a container needs nvidia.com/gpu, or --gpus all",
        part="gpu",
    )


def _seen_by_torch() -> tuple[int, str]:
    """How many it can use, and why not."""
    if find_spec("torch") is None:
        return 0, "it is not installed"
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return 0, f"{torch.__version__} is built for CPUs"
    if not torch.cuda.is_available():
        return 0, f"{torch.__version__} finds no driver for CUDA {torch.version.cuda}"
    return torch.cuda.device_count(), ""


def _driver() -> str:
    if not _DRIVER.is_file():
        return "a driver that does not say its version"
    return _DRIVER.read_text(encoding="utf-8").splitlines()[0].removeprefix("NVRM version: ").strip()


def _rdma(adapters: Path, verbs: Path) -> Finding:
    ports = sorted(adapters.glob("*/ports/*/state")) if adapters.is_dir() else []
    active = [
        f"{port.parents[2].name}/{port.parent.name}" for port in ports if "ACTIVE" in port.read_text(encoding="ascii")
    ]
    if active and any(verbs.glob("uverbs*")):
        return ok("RDMA adapters", f"active ports: {', '.join(active)}", part="rdma")
    found, cure = "none", "a machine with adapters; a pod needs their resource, as rdma/ib"
    if active:
        found = f"active ports: {', '.join(active)}; but {verbs} has no uverbs for this process"
        cure = "the resource of an RDMA device plugin, or --device /dev/infiniband"
    elif ports:
        found, cure = f"{len(ports)} ports, none of them active", "a cable and a subnet manager, or the link brought up"
    return Finding(name="RDMA adapters", verdict="worse", found=found, cost=_BY_STREAM, cure=cure, part="rdma")


def _transports() -> Finding:
    """What UCX may use; with anything but RDMA a server refuses to register memory."""
    wanted = "rc,self"
    value = os.environ.get("UCX_TLS", "")
    names = {name.strip() for name in value.split(",") if name.strip()}
    if names and all(name == "self" or name.startswith(("rc", "dc")) for name in names):
        return ok("UCX_TLS", value, part="rdma")
    return Finding(
        name="UCX_TLS",
        verdict="worse",
        found=value or "not set",
        cost="a server with server.rdma does not start, and a trainer does not open the RDMA door",
        cure=f"export UCX_TLS={wanted} (docs/across_nodes.md says why)",
        part="rdma",
    )
