"""What each rank has of tensors that are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.utils import get_total_norm


def own_shard(tensor: Tensor) -> Tensor:
    """This rank's part, without a copy; of a tensor that is not spread all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shard(own: Tensor, other: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread as `other` is, which has its shape."""
    if not isinstance(other, DTensor):
        return own
    return DTensor.from_local(
        own, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


@torch.no_grad()
def norm_over_ranks(tensors: Sequence[Tensor]) -> Tensor:
    """[] the norm of all elements of all ranks. Collective.

    Args:
        tensors: spread alike: all of them over the same ranks, or none.
    """
    own = get_total_norm([own_shard(tensor) for tensor in tensors])
    spread = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    if spread is None:
        return own
    # Ranks with copies of the same shards each have the sum already.
    parts = [Partial() if placement.is_shard() else Replicate() for placement in spread.placements]
    squares = DTensor.from_local(own.double().square(), spread.device_mesh, parts, run_check=False)
    return squares.full_tensor().sqrt().to(own.dtype)
