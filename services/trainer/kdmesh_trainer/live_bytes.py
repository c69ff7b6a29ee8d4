"""Counts the bytes that are held while code runs on tensors without memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is held now and what was at the worst moment, by the name of what it was made for.

    A storage counts from the operator that makes it until nobody refers to it. Those that change their size are what
    FSDP gathers parameters in.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: Counter[str] = Counter()
        self.worst: Counter[str] = Counter()
        self._what_for = "other"
        self._storages: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}

    @contextmanager
    def counted_as(self, name: str) -> Iterator[None]:
        """What is made meanwhile goes by that name."""
        before, self._what_for = self._what_for, name
        yield
        self._what_for = before

    def begin_phase(self) -> None:
        """The worst moment is looked for from now on."""
        self.worst = self.held.copy()

    def hold(self, tensor: Tensor) -> Tensor:
        """Count a tensor that no operator makes; it is returned."""
        self._note(tensor)
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count while this lasts."""
        kind: Any = torch.UntypedStorage
        resize = kind.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        kind.resize_ = resized
        try:
            with self:
                yield
        finally:
            kind.resize_ = resize

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):  # says how large all shards are together
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._set(key, self._what_for, storage.nbytes(), weakref.ref(storage, partial(self._gone, key)))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            reference = self._storages[key][2]
            self._forget(key)
            self._set(key, "gathered parameters", storage.nbytes(), reference)

    def _set(self, key: int, name: str, size_bytes: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        self._storages[key] = name, size_bytes, reference
        self.held[name] += size_bytes
        if self.held.total() > self.worst.total():
            self.worst = self.held.copy()

    def _gone(self, key: int, _: object) -> None:
        self._forget(key)

    def _forget(self, key: int) -> None:
        name, size_bytes, _ = self._storages.pop(key)
        self.held[name] -= size_bytes
