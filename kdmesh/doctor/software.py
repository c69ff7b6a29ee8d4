"""Versions of Python and of the packages that kdmesh is made for."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from kdmesh.doctor.finding import Finding, Part, Verdict, ok

_OLDEST_PYTHON = (3, 11)
_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "grpcio", "protobuf", "pydantic", "numpy", "pyarrow")
_EXTRAS: dict[Part, tuple[str, str]] = {
    "sglang": ("sglang", "engine.kind sglang is not to be had: servers compute with transformers"),
    "rdma": ("nixl-cu12", "the RDMA door stays shut"),
    "kubernetes": ("kubernetes", "no jobs of a cluster, and no k8s:/// addresses"),
    "jwt": ("pyjwt", "servers cannot take web tokens"),
    "lora": ("peft", "students cannot train adapters"),
    "liger": ("liger-kernel", "student.liger_kernels is not to be had"),
    "quantization": ("compressed-tensors", "student.quantization is not to be had"),
    "eightbit": ("torchao", "optimizer.moments can only be float32"),
}


def software() -> Iterator[Finding]:
    """Python, what every process needs, and what only some do; an extra that no metadata tell of is not bounded."""
    yield _python()
    wanted = _requirements()
    for name in _NEEDED:
        yield _package(
            wanted.get(name, Requirement(name)),
            cost="kdmesh was made and tested for other versions; anything may fail",
            part=None,
        )
    for part, (name, cost) in _EXTRAS.items():
        yield _package(wanted.get(name, Requirement(name)), cost=cost, part=part)


def _python() -> Finding:
    found = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info >= _OLDEST_PYTHON:
        return ok("Python", found)
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    return Finding(
        name="Python", verdict="missing", found=found, cost="nothing works", cure=f"Python {oldest} or newer"
    )


def _package(wanted: Requirement, *, cost: str, part: Part | None) -> Finding:
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        cure = f"pip install 'kdmesh[{part}]'" if part else f"pip install '{wanted.name}{wanted.specifier}'"
        return Finding(name=wanted.name, verdict=_verdict(part), found="not installed", cost=cost, cure=cure, part=part)
    if wanted.specifier.contains(found, prereleases=True):
        return ok(wanted.name, found, part)
    return Finding(
        name=wanted.name,
        verdict=_verdict(part),
        found=f"{found}, where {wanted.specifier} is wanted",
        cost=cost,
        cure=f"pip install '{wanted.name}{wanted.specifier}'",
        part=part,
    )


def _verdict(part: Part | None) -> Verdict:
    return "missing" if part is None else "worse"


def _requirements() -> dict[str, Requirement]:
    """What the installed kdmesh asks for, by the package's name; of an extra's and the rest's, the rest's."""
    found = [Requirement(text) for text in requires("kdmesh") or ()]
    return {one.name: one for one in sorted(found, key=lambda one: one.marker is None)}
