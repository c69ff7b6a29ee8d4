"""Where a model's weights are while its server sleeps."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from typing import IO

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.allocator import return_freed_memory
from kdmesh.errors import Unavailable

_LINE_BYTES = 64  # at which torch lets its own memory begin

# What torch and the system raise when memory or a disk is full.
_NO_ROOM = (OSError, RuntimeError, MemoryError)


class RestingWeights:
    """Every parameter of a model, out of its device's memory: a GPU's in pinned memory, a CPU's in a file.

    The file has no name and lies in TMPDIR. The parameters are empty until `restore`; whoever holds a view of one
    keeps that one's memory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Put them away.

        Raises:
            Unavailable: there is no room for them; nothing has changed.
        """
        self._device = model.device
        self._parameters = list(model.parameters())
        self._closing = contextlib.ExitStack()
        try:
            file = self._closing.enter_context(tempfile.TemporaryFile(prefix="kdmesh-weights-"))  # noqa: SIM115
            # All of them are safe before the first is dropped.
            self._restores = [_kept(parameter.detach(), file) for parameter in self._parameters]
            file.flush()
        except _NO_ROOM as error:
            self._closing.close()
            raise Unavailable(f"there is no room to keep the weights: {error}") from error
        for parameter in self._parameters:
            parameter.data = parameter.data.new_empty(0)
        give_back_memory(self._device)

    def restore(self) -> None:
        """Bring them back, the same bits. Raises Unavailable when there is no memory; then they go on resting."""
        try:
            restored = [restore() for restore in self._restores]
        except _NO_ROOM as error:
            give_back_memory(self._device)  # what had come back already has gone again, but not to the device
            raise Unavailable(f"the weights cannot come back: {error}") from error
        for parameter, tensor in zip(self._parameters, restored, strict=True):
            parameter.data = tensor
        self._restores = []
        self._closing.close()


def give_back_memory(device: torch.device) -> None:
    """Return what this process has freed to the device, for others to use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()


def _kept(tensor: Tensor, file: IO[bytes]) -> Callable[[], Tensor]:
    """Keep a copy; what makes the tensor again, where it was."""
    if tensor.is_cuda:
        device, pinned = tensor.device, torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        return lambda: pinned.to(device)
    offset_bytes, shape, dtype = file.tell(), tensor.shape, tensor.dtype
    file.write(_bytes_of(tensor.contiguous()))
    # Mapped weights begin anywhere in a cache line, and elsewhere the product of a single row is another sum.
    in_line = tensor.data_ptr() % _LINE_BYTES // dtype.itemsize

    def read() -> Tensor:
        again = torch.empty(in_line + shape.numel(), dtype=dtype)[in_line:].view(shape)
        file.seek(offset_bytes)
        size_bytes = file.readinto(_bytes_of(again))  # type: ignore[attr-defined]
        assert size_bytes == again.nbytes
        return again

    return read


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
