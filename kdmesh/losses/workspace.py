"""Scratch matrices of the fused loss."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


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
            held = self._bytes[name] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        return held[:size_bytes].view(dtype).view(rows, columns)


def default_workspace(device: torch.device) -> Workspace:
    """For calls that bring none: on a CPU the calling thread's own, which lasts as long as the thread."""
    if device.type != "cpu":
        return Workspace()
    if not hasattr(_of_thread, "workspace"):
        _of_thread.workspace = Workspace()
    workspace: Workspace = _of_thread.workspace
    return workspace


_of_thread = threading.local()
