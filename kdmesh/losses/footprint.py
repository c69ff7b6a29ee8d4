"""The memory that the fused loss takes besides its inputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdmesh.losses.engine import Sizes
from kdmesh.losses.gpu.form import kernel_runs_on

# Of a thread: log q, log p and q, and what a divergence makes beside them.
_TILES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of one call."""

    kept_bytes: int  # that a CPU's thread keeps for its next call
    scratch_bytes: int  # that are given back at its end


def slice_footprint(
    *,
    num_rows: int,
    num_tokens: int,
    hidden_sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Footprint:
    """Of a call on a rank that has a part of the vocabulary.

    Args:
        num_rows: of all ranks together.
        num_tokens: of the rank that has most.
        hidden_sizes: the student's, then the teacher's if there is one.
        dtype: in which the student computes.
    """
    sizes = Sizes.choose(num_rows, num_tokens, device)
    products = sizes.block_rows * num_tokens * 4 * len(hidden_sizes)
    gradient = sizes.chunk_rows * num_tokens * dtype.itemsize
    tiles = 3 * sizes.num_threads * sizes.tile_rows * num_tokens * 4
    # A chunk's rows as they come from all ranks, and the gradient of the student's as it goes back, in float32.
    travelling = sizes.chunk_rows * (sum(hidden_sizes) * dtype.itemsize + hidden_sizes[0] * 4)
    # The part of the weight in the type of the rows, where that is not the one which is trained.
    cast = num_tokens * hidden_sizes[0] * dtype.itemsize if dtype is not torch.float32 else 0
    if device.type == "cpu":
        return Footprint(kept_bytes=products + gradient, scratch_bytes=tiles + travelling + cast)
    return Footprint(kept_bytes=0, scratch_bytes=products + gradient + tiles + travelling + cast)


def loss_footprint(
    *,
    num_rows: int,
    vocabulary_size: int,
    hidden_size: int,
    num_teachers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Footprint:
    """Of a call with `num_rows` rows and a divergence that the kernel knows, where one runs on `device`.

    Args:
        hidden_size: the student's.
        num_teachers: 0 for cross-entropy alone.
        dtype: in which the student computes.
    """
    with_kernel = device.type == "cuda" and kernel_runs_on(device)
    sizes = Sizes.choose(num_rows, vocabulary_size, device, with_kernel=with_kernel)
    products = sizes.block_rows * vocabulary_size * 4 * (1 + num_teachers)
    gradient = 0 if sizes.in_place else sizes.chunk_rows * vocabulary_size * dtype.itemsize
    tiles = 0 if with_kernel else _TILES * sizes.num_threads * sizes.tile_rows * vocabulary_size * 4
    transposed = sizes.chunk_rows * hidden_size * dtype.itemsize if device.type == "cpu" else 0
    if device.type == "cpu":
        return Footprint(kept_bytes=products + gradient, scratch_bytes=tiles + transposed)
    return Footprint(kept_bytes=0, scratch_bytes=products + gradient + tiles)
