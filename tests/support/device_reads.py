"""Finds what would make the host wait for a GPU, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators whose result the host must know, which on a GPU would wait for everything before them; and `tolist`."""

    _SIZES = ("nonzero.", "masked_select", "unique", "bincount", "repeat_interleave.Tensor")
    _VALUES = ("_local_scalar_dense", "item", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []
        self._listing = mock.patch.object(Tensor, "tolist", lambda tensor: self._listed(tensor))

    def __enter__(self) -> Reads:
        self._listing.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._listing.stop()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith(("index.", "index_put")) and any(_is_mask(index) for index in args[1])
        is_told = options.get("output_size") is not None  # repeat_interleave need not find it
        if by_mask or (name.startswith((*self._SIZES, *self._VALUES)) and not is_told):
            self.seen.append(name)
        return func(*args, **options)

    def _listed(self, tensor: Tensor) -> Any:
        """Of which torch dispatches nothing on a CPU."""
        self.seen.append("tolist")
        return tensor.numpy().tolist()


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
