"""Moments that blocks of values share a scale of, read where a rank's part begins or ends within a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import filesystem
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def has_rounded(moments: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any is kept in a type of its own, as torchao's are."""
    return any(_is_rounded(value) for of_one in moments.values() for value in of_one.values())


def bytes_in_files(value: Tensor) -> int:
    """Of all shards of a tensor, where each is kept as this rank's is; moments in a type of their own tell more."""
    own = _local(value)
    if not is_traceable_wrapper_subclass(own):
        return value.numel() * value.element_size()
    parts = (getattr(own, name) for name in own.__tensor_flatten__()[0])
    return -(-sum(part.nbytes for part in parts) * value.numel() // own.numel())


@contextmanager
def widened(moments: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, dict[str, Any]]]:
    """The same, in float32 where they are rounded, to load a checkpoint into: it is rounded anew at the end.

    Meanwhile a checkpoint's blocks may be cut anywhere. Values that come from whole blocks may be rounded to their
    neighbours, so this is for a run on another number of ranks only.
    """
    wide = {name: {key: _wide(value) for key, value in of_one.items()} for name, of_one in moments.items()}

    def narrow_anywhere(tensor: Tensor, *where: Any) -> Tensor:
        return narrow_tensor_by_index(tensor.dequantize() if _is_rounded(tensor) else tensor, *where)

    # Between reading a block and taking a part of it, torch lets nobody in.
    with mock.patch.object(filesystem, "narrow_tensor_by_index", narrow_anywhere):
        yield wide
    for name, of_one in moments.items():
        for key, value in of_one.items():
            if _is_rounded(value):
                _local(value).copy_(_local(wide[name][key]))


def _is_rounded(value: object) -> bool:
    return isinstance(value, Tensor) and type(_local(value)) is not Tensor


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _wide(value: Any) -> Any:
    if not _is_rounded(value):
        return value
    local = _local(value).dequantize()
    if not isinstance(value, DTensor):
        return local
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
