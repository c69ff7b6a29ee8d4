"""What a consumer of handles needs of any door."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kdmesh.types import Handle


class Door(Protocol):
    """A way for bytes to get from a server's segments to tensors of this process.

    It belongs to the event loop that it was opened on.
    """

    @property
    def name(self) -> str:
        """For reports: `shm` or `stream`."""

    async def fetch(self, handle: Handle) -> Tensor:
        """[rows, cols] on the CPU, good for as long as it or a view of it lives. Never write to it.

        Takes the handle to a slot over: fetch it once; it is released by itself, also when the fetch is cancelled.
        The handle to a shared segment can be fetched again. Waits for the server as long as that takes: the
        deadline is the caller's.

        Raises:
            HandleGone: the handle or the session has ended.
            Unavailable: the server is gone, or the door is closed.
            EngineFailure: the server broke the protocol.
        """

    def forget(self, handle: Handle) -> None:
        """A shared segment that was fetched is not fetched again. Its tensors stay good."""

    def close(self) -> None:
        """Fetch no more; fetches under way fail. Tensors stay good."""


def matrix_over(exporter: Any, handle: Handle, *, offset_bytes: int) -> Tensor:
    """[rows, cols] over a writable buffer, which lives as long as the tensor and its views."""
    dtype = getattr(torch, handle.dtype.value)
    flat = torch.frombuffer(exporter, dtype=dtype, count=handle.rows * handle.cols, offset=offset_bytes)
    return flat.view(handle.rows, handle.cols)
