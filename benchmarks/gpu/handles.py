"""A slot's bytes on their way to a GPU and back: as plain memory, and registered with CUDA."""

from __future__ import annotations

import contextlib
import mmap
import warnings
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.scale import Scale, median_ms
from kdmesh.handles.slab.memory import create_segment, map_readonly

_READ_ONLY = 8  # cudaHostRegisterReadOnly


def measure(scale: Scale) -> dict[str, object]:
    """GB/s of a reader's copy to the device and of a writer's from it; what CUDA says where it does not register."""
    size_bytes = 64 * 2**20 if scale.device.type == "cuda" else 2**16
    segment = create_segment(size_bytes)
    writer = torch.frombuffer(segment.writable, dtype=torch.uint8)
    writer.copy_(torch.arange(size_bytes, dtype=torch.int64) % 251)
    mapping: mmap.mmap = map_readonly(segment.fd, segment.size_bytes)
    reader = _tensor(mapping)
    there = torch.empty(size_bytes, dtype=torch.uint8, device=scale.device)
    figures: dict[str, object] = {}
    for name, source, target, flags in (
        ("to the device", reader, there, _READ_ONLY),
        ("from the device", there, writer, 0),
    ):
        host = source if source.device.type == "cpu" else target
        figures[f"{name}, plain (GB/s)"] = _rate(source, target, scale)
        refusal = register(host, flags) if scale.device.type == "cuda" else "there is no CUDA here"
        if refusal:
            figures[f"{name}, registered"] = f"refused: {refusal}"
            continue
        figures[f"{name}, registered (GB/s)"] = _rate(source, target, scale)
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())  # type: ignore[no-untyped-call]
    there.copy_(reader)
    assert torch.equal(there.cpu(), writer), "the bytes are not the slot's"
    return figures


def register(host: Tensor, flags: int) -> str:
    """Pin memory that is there already, so that the device copies it by itself; why not, or nothing."""
    code = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), flags)  # type: ignore[no-untyped-call]
    if int(code) == 0:
        return ""
    with contextlib.suppress(RuntimeError):  # CUDA tells the next caller, whoever that is
        torch.zeros(1, device="cuda")
    return f"{code}"


def _rate(source: Tensor, target: Tensor, scale: Scale) -> float:
    took_ms = median_ms(partial(target.copy_, source, non_blocking=True), scale)
    return round(source.numel() / took_ms / 1e6, 2)


def _tensor(mapping: mmap.mmap) -> Tensor:
    """Over a read-only mapping, which torch warns about and nobody writes to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(mapping, dtype=torch.uint8)
