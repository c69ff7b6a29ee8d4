"""The loop of the fused loss over chunks of rows, which bounds its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdmesh.losses.head import OutputHead
from kdmesh.losses.matmul import logits_into, spans, weight_gradient_into
from kdmesh.losses.rows import RowMaths
from kdmesh.losses.workspace import Workspace


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
    def allocate(cls, student: Side, wanted: tuple[bool, ...]) -> Gradients:
        """Those of (hidden, weight, bias) that are wanted; `sweep` fills them, but adds to the bias."""
        hidden_RD, weight_VD = student.hidden_RD, student.head.weight_VD
        hidden, weight, bias = wanted
        return cls(
            hidden_RD=torch.empty_like(hidden_RD) if hidden else None,
            weight_VD=torch.empty_like(weight_VD, dtype=student.product_dtype) if weight else None,
            bias_V=weight_VD.new_zeros(len(weight_VD), dtype=student.product_dtype) if bias else None,
        )

    def zero_(self) -> None:
        """What they are without rows."""
        for gradient in (self.hidden_RD, self.weight_VD, self.bias_V):
            if gradient is not None:
                gradient.zero_()

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
    def choose(
        cls, num_rows: int, vocabulary_size: int, device: torch.device, chunk_tokens: int | None = None
    ) -> Sizes:
        """What suits the device; `chunk_tokens` replaces the chunk's default."""
        if device.type == "cpu":
            chunk = chunk_tokens or 1024
            block = min(1024, max(256, 2**25 // vocabulary_size))  # below 256 rows a product wastes its time on packing
            tile = 2**17 * torch.get_num_threads() // vocabulary_size
        else:
            chunk = block = chunk_tokens or 2048
            tile = 2**25 // vocabulary_size
        chunk = max(1, min(chunk, num_rows))
        block = min(chunk, block)
        return cls(chunk_rows=chunk, block_rows=block, tile_rows=max(1, min(block, tile)))


def sweep(sides: Sequence[Side], maths: RowMaths, gradients: Gradients, sizes: Sizes, workspace: Workspace) -> None:
    """Run `maths` over every row and fill the gradients that are wanted. The student is sides[0]."""
    student = sides[0]
    num_rows, vocabulary_size, device = len(student.hidden_RD), student.head.vocabulary_size, student.hidden_RD.device
    if num_rows == 0:
        gradients.zero_()
        return
    products = [
        workspace.matrix(f"product {n}", sizes.block_rows, vocabulary_size, dtype=side.product_dtype, device=device)
        for n, side in enumerate(sides)
    ]
    gradient_CV = None
    if gradients.is_wanted:
        gradient_CV = workspace.matrix(
            "logit gradient", sizes.chunk_rows, vocabulary_size, dtype=student.hidden_RD.dtype, device=device
        )
    for chunk in spans(num_rows, sizes.chunk_rows):
        chunk_gradient_CV = None if gradient_CV is None else gradient_CV[: chunk.stop - chunk.start]
        for block in spans(chunk.stop - chunk.start, sizes.block_rows):
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            block_products = [product_BV[: rows.stop - rows.start] for product_BV in products]
            for side, product_BV in zip(sides, block_products, strict=True):
                logits_into(product_BV, side.hidden_RD[rows], side.head.weight_VD, workspace)
            block_gradient_BV = None if chunk_gradient_CV is None else chunk_gradient_CV[block]
            _by_tiles(rows, block_products, block_gradient_BV, maths, sizes.tile_rows)
        if chunk_gradient_CV is not None:
            _chain_rule(student, chunk, chunk_gradient_CV, gradients, workspace)


def _by_tiles(rows: slice, products: list[Tensor], gradient_BV: Tensor | None, maths: RowMaths, tile_rows: int) -> None:
    tiles = list(range(rows.start, rows.stop, tile_rows))
    gradients = [None] * len(tiles) if gradient_BV is None else torch.split(gradient_BV, tile_rows)
    products_by_tile = zip(*(torch.split(product_BV, tile_rows) for product_BV in products), strict=True)
    for start, tile_products, gradient_CV in zip(tiles, products_by_tile, gradients, strict=True):
        maths.tile(slice(start, min(start + tile_rows, rows.stop)), tile_products, gradient_CV)
    maths.end_block(products)


def _chain_rule(student: Side, rows: slice, gradient_CV: Tensor, gradients: Gradients, workspace: Workspace) -> None:
    """From the gradient of a chunk's products to that of its rows and of the weight."""
    if gradients.hidden_RD is not None:
        torch.mm(gradient_CV, student.head.weight_VD, out=gradients.hidden_RD[rows])
    if gradients.weight_VD is not None:
        weight_gradient_into(gradients.weight_VD, gradient_CV, student.hidden_RD[rows], workspace, adds=rows.start > 0)
