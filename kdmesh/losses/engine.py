"""The loop of the fused loss over chunks of rows, which bounds its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdmesh.losses.head import OutputHead
from kdmesh.losses.matmul import add_weight_gradient, logits_into, spans
from kdmesh.losses.rows import RowMaths


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """One model's rows and head, both of the dtype that their product is computed in."""

    hidden_RD: Tensor
    head: OutputHead

    @classmethod
    def build(cls, hidden_RD: Tensor, head: OutputHead, *, is_double: bool) -> Side:
        """Casts what has to be cast: bfloat16 stays where both are, float64 rules, all else is float32."""
        dtype = torch.promote_types(hidden_RD.dtype, head.weight_VD.dtype)
        if is_double:
            dtype = torch.float64
        elif dtype is not torch.bfloat16:
            dtype = torch.float32
        return cls(hidden_RD=hidden_RD.to(dtype), head=replace(head, weight_VD=head.weight_VD.to(dtype)))

    @property
    def product_dtype(self) -> torch.dtype:
        """Of hidden @ weight.T."""
        return torch.promote_types(self.hidden_RD.dtype, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Derivatives of the loss sum; None where nobody wants one."""

    hidden_RD: Tensor | None  # dtype of the student's rows
    weight_VD: Tensor | None  # float32, or float64 with a float64 student
    bias_V: Tensor | None  # as weight_VD

    @classmethod
    def zeros(cls, student: Side, wanted: tuple[bool, ...]) -> Gradients:
        """Zeros for those of (hidden, weight, bias) that are wanted."""
        hidden_RD, weight_VD = student.hidden_RD, student.head.weight_VD
        hidden, weight, bias = wanted
        return cls(
            hidden_RD=torch.zeros_like(hidden_RD) if hidden else None,
            weight_VD=torch.zeros_like(weight_VD, dtype=student.product_dtype) if weight else None,
            bias_V=weight_VD.new_zeros(len(weight_VD), dtype=student.product_dtype) if bias else None,
        )

    @property
    def is_wanted(self) -> bool:
        """Whether there is any."""
        return any(gradient is not None for gradient in (self.hidden_RD, self.weight_VD, self.bias_V))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows are worked on at a time, at three levels.

    A chunk's logit gradient exists at once, so that the weight gradient is added to once per chunk. Of
    its logits one block exists at once. Elementwise work goes tile by tile.
    """

    chunk_rows: int
    block_rows: int
    tile_rows: int

    @classmethod
    def choose(cls, vocabulary_size: int, device: torch.device, chunk_tokens: int | None) -> Sizes:
        """What suits the device; `chunk_tokens` replaces the chunk's default."""
        on_cpu = device.type == "cpu"
        if chunk_tokens is None:
            chunk_tokens = 1024 if on_cpu else 2048
        block = min(chunk_tokens, 512) if on_cpu else chunk_tokens
        tile_elements = 2**17 * torch.get_num_threads() if on_cpu else 2**25
        tile = min(block, max(1, tile_elements // vocabulary_size))
        return cls(chunk_rows=chunk_tokens, block_rows=block, tile_rows=tile)


def sweep(sides: list[Side], maths: RowMaths, gradients: Gradients, sizes: Sizes) -> None:
    """Run `maths` over every row and add up the gradients that are wanted. The student is sides[0]."""
    student = sides[0]
    num_rows, vocabulary_size = len(student.hidden_RD), student.head.vocabulary_size
    products = [
        side.hidden_RD.new_empty(min(sizes.block_rows, num_rows), vocabulary_size, dtype=side.product_dtype)
        for side in sides
    ]
    gradient_CV = None
    if gradients.is_wanted:
        gradient_CV = student.hidden_RD.new_empty(min(sizes.chunk_rows, num_rows), vocabulary_size)
    for chunk in spans(num_rows, sizes.chunk_rows):
        chunk_gradient_CV = None if gradient_CV is None else gradient_CV[: chunk.stop - chunk.start]
        for block in spans(chunk.stop - chunk.start, sizes.block_rows):
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            block_products = [product_BV[: rows.stop - rows.start] for product_BV in products]
            for side, product_BV in zip(sides, block_products, strict=True):
                logits_into(product_BV, side.hidden_RD[rows], side.head.weight_VD)
            block_gradient_BV = None if chunk_gradient_CV is None else chunk_gradient_CV[block]
            _by_tiles(rows, block_products, block_gradient_BV, maths, sizes.tile_rows)
        if chunk_gradient_CV is not None:
            _chain_rule(student, chunk, chunk_gradient_CV, gradients)


def _by_tiles(rows: slice, products: list[Tensor], gradient_BV: Tensor | None, maths: RowMaths, tile_rows: int) -> None:
    tiles = list(range(rows.start, rows.stop, tile_rows))
    gradients = [None] * len(tiles) if gradient_BV is None else torch.split(gradient_BV, tile_rows)
    products_by_tile = zip(*(torch.split(product_BV, tile_rows) for product_BV in products), strict=True)
    for start, tile_products, gradient_CV in zip(tiles, products_by_tile, gradients, strict=True):
        maths.tile(slice(start, min(start + tile_rows, rows.stop)), tile_products, gradient_CV)
    maths.end_block(products)


def _chain_rule(student: Side, rows: slice, gradient_CV: Tensor, gradients: Gradients) -> None:
    """From the gradient of a chunk's products to that of its rows and of the weight."""
    if gradients.hidden_RD is not None:
        torch.mm(gradient_CV, student.head.weight_VD, out=gradients.hidden_RD[rows])
    if gradients.weight_VD is not None:
        add_weight_gradient(gradients.weight_VD, gradient_CV, student.hidden_RD[rows])
