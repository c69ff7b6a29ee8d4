"""Matrices that are not trained, at rest in four bits a number: NF4.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E, without double quantization.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding, linear

from kdmesh.errors import ConfigError
from kdmesh_trainer.student.shards import own_shard

BLOCK = 64  # neighbours in a row that share a scale
_BLOCK_BYTES = BLOCK // 2 + 4  # codes, and a scale in float32

# What a code stands for, times its block's scale: quantiles of a normal distribution, with 0 and both ends of [-1, 1].
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def pack(matrix: Tensor) -> Tensor:
    """[rows, columns / 64 * 36] bytes of a matrix: the codes of a row, the even columns' in the high half, its scales.

    Args:
        matrix: [rows, columns], float32; 64 divides the columns.
    """
    rows = matrix.shape[0]
    blocks = matrix.view(rows, -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True)
    values = torch.tensor(VALUES, device=matrix.device)
    shares = blocks / scales.where(scales > 0, 1.0)
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2, out_int32=True).byte()
    pairs = codes[..., ::2] << 4 | codes[..., 1::2]
    return torch.cat([pairs.view(rows, -1), scales.view(rows, -1).view(torch.uint8)], dim=1)


def unpack(packed: Tensor) -> Tensor:
    """[rows, columns] bfloat16: the numbers that `pack` kept, each rounded once. Of a shard, this rank's part.

    Rounded whatever the student computes in, so that they are the same in servers that hold them in bfloat16.
    """
    own = own_shard(packed)
    numbers = _numbers(own, _pairs(own.device))
    if not isinstance(packed, DTensor):
        return numbers
    rows, columns = numbers_shape(packed)
    return DTensor.from_local(
        numbers,
        packed.device_mesh,
        packed.placements,
        run_check=False,
        shape=torch.Size((rows, columns)),
        stride=(columns, 1),
    )


def _numbers(packed: Tensor, pairs: Tensor) -> Tensor:
    # FSDP may hand bytes on in the type that is computed in, which holds every one.
    packed = packed.to(torch.uint8)
    rows, columns = numbers_shape(packed)
    numbers = embedding(packed[:, : columns // 2].int(), pairs).view(rows, columns // BLOCK, BLOCK)
    scales = packed[:, columns // 2 :].contiguous().view(torch.float32)
    return numbers.mul_(scales[..., None]).bfloat16().view(rows, columns)


def _pairs(device: torch.device | None = None) -> Tensor:
    """[256, 2] float32: what the two codes of a byte stand for."""
    values = torch.tensor(VALUES, device=device)
    return torch.cartesian_prod(values, values)


class FourBitLinear(nn.Module):
    """A linear module whose matrix rests in four bits; neither that nor its bias is trained."""

    def __init__(self, replaced: nn.Linear) -> None:
        """
        Args:
            replaced: what it takes the place of, in float32; 64 divides its inputs.
        """
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.weight = nn.Parameter(pack(replaced.weight.detach()), requires_grad=False)
        self.bias = replaced.bias
        # On the device once: a copy in every pass would have the host wait for it.
        self.register_buffer("pairs", _pairs(), persistent=False)

    # Compiled code would keep whole matrices for the backward pass, and leave out rounding to bfloat16 in float32.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input_: Tensor) -> Tensor:
        """As a linear module of the numbers that are kept, in the input's type.

        Raises:
            ConfigError: the model has converted the input to the type of the weights, which here are bytes.
        """
        if not input_.is_floating_point():
            raise ConfigError(f"student.lora.base nf4: the student's layers convert their inputs to {input_.dtype}")
        return cast(Tensor, _Linear.apply(input_, self.weight, self.pairs, self.bias))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """A linear map that keeps the bytes for the backward pass, and not the numbers."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, packed: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
        """[..., rows]."""
        ctx.save_for_backward(packed, pairs)
        return linear(input_, _numbers(packed, pairs).to(input_.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """[..., columns]."""
        packed, pairs = ctx.saved_tensors
        return gradient @ _numbers(packed, pairs).to(gradient.dtype), None, None, None


def rest_in_four_bits(lm: nn.Module, names: Collection[str]) -> None:
    """Put a FourBitLinear in the place of each linear module that is named, which `refuse_uneven` lets through."""
    for name in names:
        lm.set_submodule(name, FourBitLinear(cast(nn.Linear, lm.get_submodule(name))))


def refuse_uneven(lm: nn.Module, names: Collection[str]) -> None:
    """Raises ConfigError when a linear module that is named has inputs that blocks do not divide."""
    for name in names:
        inputs = cast(nn.Linear, lm.get_submodule(name)).in_features
        if inputs % BLOCK:
            raise ConfigError(
                f"student.lora.base nf4 keeps {BLOCK} numbers of a row together, and {name} has {inputs} inputs, which "
                f"{BLOCK} does not divide"
            )


def numbers_shape(packed: Tensor) -> tuple[int, int]:
    """Of the whole matrix whose bytes these are."""
    return packed.shape[0], packed.shape[1] // _BLOCK_BYTES * BLOCK
