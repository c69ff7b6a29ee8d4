"""Scratch matrices of the fused loss."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20


class Workspace:
    """Scratch matrices that the next call uses again; for one thread at a time.

    A CPU allocator gives large blocks back to the system, so a call without a lasting workspace pays
    for every page's first touch. Holds as much as the largest call needed.
    """

    def __init__(self) -> None:
        self._bytes: dict[str, Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, columns] of arbitrary content, which is the caller's until `name` is asked for again."""
        size_bytes = rows * columns * dtype.itemsize
        held = self._bytes.get(name)
        if held is None or len(held) < size_bytes or held.device != device:
            held = None
            self._bytes.pop(name, None)  # before its successor takes as much
            held = self._bytes[name] = _allocate(size_bytes, device)
        return held[:size_bytes].view(dtype).view(rows, columns)


def _allocate(size_bytes: int, device: torch.device) -> Tensor:
    """Bytes; on a CPU in huge pages where the kernel has some: a hundred MiB of others take longer to touch first
    than a product takes to fill them."""
    if device.type != "cpu" or size_bytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, -(-size_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
