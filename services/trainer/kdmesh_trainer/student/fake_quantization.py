"""Linear modules that compute with matrices rounded to few bits, and train what is rounded.

Sources: Jacob et al. 2018, arXiv:1712.05877, section 3 (rounding in the forward pass alone); Bengio et al. 2013,
arXiv:1308.3432 (the straight-through gradient). Scales and ranges of matrices are those of compressed-tensors 0.20, in
whose format the student is written; those of activations are those of SGLang 0.5's and vLLM's kernels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kdmesh_trainer.student.shards import like_shard, own_shard

if TYPE_CHECKING:
    from kdmesh_trainer.sections.quantization_config import ActivationNumbers, QuantizationConfig, WeightNumbers

# What the largest of those that share a scale is divided to. Half a step beyond the largest of the positive integers:
# it is then off by as much as rounding may be anyway.
_LARGEST = {"int4": 7.5, "int8": 127.5, "fp8": 448.0}
_RANGE = {"int4": (-8.0, 7.0), "int8": (-128.0, 127.0), "fp8": (-448.0, 448.0)}
# Of a token's activations: a whole number, since of one half-way between two the last bit would decide.
_LARGEST_INPUT = {"int8": 127.0, "fp8": 448.0}
_LEAST_SCALE = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How the matrix of a module is rounded, and what the module is given."""

    numbers: WeightNumbers
    group_size: int | None  # None: a row has one scale
    activations: ActivationNumbers
    compute_dtype: torch.dtype  # that the matrix is cast to before it is rounded

    @staticmethod
    def of(config: QuantizationConfig, compute_dtype: torch.dtype) -> Rounding:
        """As the configuration says."""
        return Rounding(
            numbers=config.weights,
            group_size=config.group_size,
            activations=config.activations,
            compute_dtype=compute_dtype,
        )

    def codes(self, master: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, columns] and [rows, groups] float32: a matrix divided by its scales and rounded; the scales.

        Scales are numbers of bfloat16, which engines keep them in.

        Args:
            master: [rows, columns], whole rows; the group's size divides the columns.
        """
        rows, columns = master.shape
        size = self.group_size or columns
        groups = master.to(self.compute_dtype).float().view(rows, columns // size, size)
        scales = groups.abs().amax(-1, keepdim=True) / _LARGEST[self.numbers]
        scales = scales.bfloat16().float().clamp_(min=_LEAST_SCALE)  # rows of zeros have one, too
        # Counts, and no -1: a rank's part may have no rows.
        return _round_(groups / scales, self.numbers).view(rows, columns), scales.view(rows, columns // size)

    def rounded(self, master: Tensor) -> Tensor:
        """[rows, columns] in the type that is computed in: what the module multiplies with. Of a shard, this rank's.

        Args:
            master: in that type already, or in the one that is trained.
        """
        own = own_shard(master)
        codes, scales = self.codes(own)
        products = codes.view(*scales.shape, self.group_size or own.shape[1]).mul_(scales[..., None])
        return like_shard(products.view(own.shape).to(self.compute_dtype), master)

    def rounded_input(self, input_: Tensor) -> Tensor:
        """[..., columns] rounded by a scale for each token, in the type of the input; scales are float32 or wider.

        It is the input itself where activations are not rounded.
        """
        if self.activations == "none":
            return input_
        wide = input_.to(torch.promote_types(input_.dtype, torch.float32))
        scales = wide.abs().amax(-1, keepdim=True) / _LARGEST_INPUT[self.activations]
        scales = scales.where(scales != 0, 1.0)
        return _round_(wide / scales, self.activations).mul_(scales).to(input_.dtype)


def _round_(shares: Tensor, numbers: WeightNumbers) -> Tensor:
    """To the nearest of these numbers, and the nearest even one of two, in place or in a tensor like it."""
    shares = shares.clamp_(*_RANGE[numbers])
    return shares.to(torch.float8_e4m3fn).to(shares.dtype) if numbers == "fp8" else shares.round_()


class QuantizedLinear(nn.Module):
    """A linear module of a rounded matrix. Its own is in full precision, and gets the gradient of the rounded one.

    Nothing is cut off: scales follow the largest number, so that none is off by more than half a step and what the
    scale itself is rounded by, and every number has a gradient.
    """

    def __init__(self, replaced: nn.Linear, rounding: Rounding) -> None:
        """
        Args:
            replaced: what it takes the place of, with the same parameters.
        """
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.weight, self.bias = replaced.weight, replaced.bias
        self.rounding = rounding

    # On a GPU compiled code divides approximately (Triton's div.full), and would not round to what is written.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input_: Tensor) -> Tensor:
        """[..., rows] in the input's type, which is that of the parameters."""
        return cast(Tensor, _Linear.apply(input_, self.weight, self.bias, self.rounding))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """A linear map that keeps nothing rounded for the backward pass, and rounds again there."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
        """[..., rows]."""
        ctx.save_for_backward(input_, weight)
        ctx.rounding = rounding
        return linear(rounding.rounded_input(input_), rounding.rounded(weight), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Of the input, the matrix and the bias: as if both factors had come in rounded."""
        input_, weight = ctx.saved_tensors
        of_input, of_weight, of_bias, _ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_input = gradient @ ctx.rounding.rounded(weight) if of_input else None
        for_weight = None
        if of_weight:
            for_weight = flat.t() @ ctx.rounding.rounded_input(input_).reshape(-1, input_.shape[-1])
        return for_input, for_weight, flat.sum(0) if of_bias else None, None


def compute_rounded(lm: nn.Module, names: Collection[str], rounding: Rounding) -> None:
    """Put a QuantizedLinear in the place of each linear module that is named."""
    for name in names:
        lm.set_submodule(name, QuantizedLinear(cast(nn.Linear, lm.get_submodule(name)), rounding))
