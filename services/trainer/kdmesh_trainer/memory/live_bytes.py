"""Counts the bytes that are held while code runs on tensors without memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from kdmesh_trainer.student.shards import own_shard


class Ledger:
    """What one memory holds now and held at the worst moment, by the name of what it was made for."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.worst: Counter[str] = Counter()

    def begin_phase(self) -> None:
        """The worst moment is looked for from now on."""
        self.worst = self.held.copy()

    def add(self, name: str, size_bytes: int) -> None:
        """More is held."""
        self.held[name] += size_bytes
        if self.held.total() > self.worst.total():
            self.worst = self.held.copy()

    def take(self, name: str, size_bytes: int) -> None:
        """Less is held."""
        self.held[name] -= size_bytes


_EXCHANGES = ("c10d._allgather_base_.", "c10d._reduce_scatter_base_.")  # FSDP's; of a whole tensor and of one shard


class _Storage(NamedTuple):
    ledger: Ledger
    name: str
    size_bytes: int
    reference: weakref.ref[torch.UntypedStorage]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a device and its host hold.

    A storage counts from the operator that makes it until nobody refers to it. Those that change their size are what
    FSDP gathers parameters in. All of them are the device's, but those that are said to be the host's.
    """

    def __init__(self, *, copies_exchanged: bool) -> None:
        """`copies_exchanged`: what is gathered or reduced is copied whole on its way, as by gloo and not by NCCL."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies_exchanged = copies_exchanged
        self.device = Ledger()
        self.host = Ledger()
        self._what_for = "other"
        self._where = self.device
        self._storages: dict[int, _Storage] = {}

    @contextmanager
    def counted_as(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """What is made meanwhile goes by that name, and is the host's if so."""
        before = self._what_for, self._where
        self._what_for, self._where = name, self.host if on_host else self.device
        yield
        self._what_for, self._where = before

    def hold(self, tensor: Tensor) -> Tensor:
        """Count a tensor that no operator makes; it is returned."""
        self._note(tensor)
        return tensor

    def move_to_host(self, tensor: Tensor, name: str) -> None:
        """The storage of a tensor is the host's from now on, by that name."""
        key = _storage(tensor)._cdata
        if (known := self._storages.get(key)) is not None and known.ledger is not self.host:
            self._forget(key)
            self._set(key, known._replace(ledger=self.host, name=name))

    def rename(self, tensor: Tensor, name: str) -> None:
        """The storage of a tensor goes by that name from now on."""
        key = _storage(tensor)._cdata
        known = self._storages[key]
        self._forget(key)
        self._set(key, known._replace(name=name))

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
        if self._copies_exchanged and str(func).startswith(_EXCHANGES):
            whole = max(tensor.nbytes for tensor in args if isinstance(tensor, Tensor))
            self.device.add("copies in gloo", whole)
            self.device.take("copies in gloo", whole)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):  # a DTensor, or moments of 8 bits: only what it is made of has memory
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            for part in parts:
                if isinstance(part, Tensor):  # and not the mesh that it lies on
                    self._note(part)
            return
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._storages:
            gone = weakref.ref(storage, partial(self._gone, key))
            self._set(key, _Storage(self._where, self._what_for, storage.nbytes(), gone))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            known = self._storages[key]
            self._forget(key)
            self._set(key, known._replace(name="gathered parameters", size_bytes=storage.nbytes()))

    def _set(self, key: int, storage: _Storage) -> None:
        self._storages[key] = storage
        storage.ledger.add(storage.name, storage.size_bytes)

    def _gone(self, key: int, _: object) -> None:
        self._forget(key)

    def _forget(self, key: int) -> None:
        known = self._storages.pop(key)
        known.ledger.take(known.name, known.size_bytes)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    # A DTensor says how large all shards are together.
    return own_shard(tensor).untyped_storage()
