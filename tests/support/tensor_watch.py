"""Watches every tensor that a piece of code makes, below autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorWatch(TorchDispatchMode):
    """Notes the largest tensor, and the most bytes that were alive at once, of those made under it."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """`known` were there before and do not count."""
        super().__init__()
        self.largest_bytes = 0
        self.peak_bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._known:
            return
        self.largest_bytes = max(self.largest_bytes, tensor.nbytes)
        self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()


class SavedTensors:
    """Notes the elements that autograd keeps for a backward pass; a context manager."""

    def __init__(self) -> None:
        self.numels: list[int] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.numels.append(tensor.numel())
        return tensor

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.__exit__(*exc)
