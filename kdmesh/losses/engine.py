"""The loop of the fused loss over chunks of rows, which bounds its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kdmesh.losses.head import OutputHead
from kdmesh.losses.matmul import hidden_gradient_into, logits_into, spans, weight_gradient_into
from kdmesh.losses.rows import RowMaths, RowValues
from kdmesh.losses.threads import run_each
from kdmesh.losses.workspace import Workspace

_PRODUCT_ROWS = 128  # of a tile of a GPU's matrix product
_ALIGNMENT = 128  # columns, so that rows begin where whole vectors of memory do


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
    bias_NV: Tensor | None  # as weight_VD; one row for each thread to add to, so the sum over N is meant

    @classmethod
    def allocate(cls, student: Side, wanted: tuple[bool, ...], *, num_threads: int) -> Gradients:
        """Those of (hidden, weight, bias) that are wanted: the bias zero, the others zero where there are no rows."""
        hidden, weight, bias = wanted
        hidden_RD, weight_VD, dtype = student.hidden_RD, student.head.weight_VD, student.product_dtype
        allocate = torch.empty_like if len(hidden_RD) > 0 else torch.zeros_like
        return cls(
            hidden_RD=allocate(hidden_RD) if hidden else None,
            weight_VD=allocate(weight_VD, dtype=dtype) if weight else None,
            bias_NV=weight_VD.new_zeros(num_threads, len(weight_VD), dtype=dtype) if bias else None,
        )

    @property
    def is_wanted(self) -> bool:
        """Whether there is any."""
        return any(gradient is not None for gradient in (self.hidden_RD, self.weight_VD, self.bias_NV))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows are worked on at a time, at three levels, and on how many threads.

    A chunk's logit gradient exists at once, so that the weight gradient is added to once per chunk. Of
    its logits one block exists at once. Elementwise work on a block is shared by threads, tile by tile.
    """

    chunk_rows: int
    block_rows: int
    tile_rows: int
    num_threads: int
    in_place: bool = False  # whether the logit gradient lies over the student's logits
    multiple: int = 16  # of which chunks and blocks have equally many rows, as far as the number of rows allows

    @classmethod
    def choose(
        cls,
        num_rows: int,
        vocabulary_size: int,
        device: torch.device,
        chunk_tokens: int | None = None,
        *,
        with_kernel: bool = False,
    ) -> Sizes:
        """What suits the device; `chunk_tokens` replaces the chunk's default.

        Args:
            with_kernel: whether `KernelRows` does the elementwise work, for which a chunk is a tile.
        """
        if with_kernel:
            chunk = max(1, min(chunk_tokens or 2048, num_rows))
            return cls(
                chunk_rows=chunk,
                block_rows=chunk,
                tile_rows=chunk,
                num_threads=1,
                in_place=True,
                multiple=_PRODUCT_ROWS,
            )
        if device.type == "cpu":
            chunk = chunk_tokens or 2048
            # A product arranges the weight anew for every block: below 256 rows, much of its time. Above 64 MiB of
            # logits, their first touch is.
            block = min(1024, max(256, 2**24 // vocabulary_size))
            num_threads = torch.get_num_threads()
            # Half a MiB, several of which fit a core's cache. Threads also wait for the interpreter's lock between
            # operators, and the fewer the better: twice as much is faster there.
            tile = (2**17 if num_threads == 1 else 2**18) // vocabulary_size
        else:
            chunk = block = chunk_tokens or 2048
            tile = 2**25 // vocabulary_size
            num_threads = 1
        chunk = max(1, min(chunk, num_rows))
        block = min(chunk, block)
        tile = max(1, min(block, tile))
        return cls(chunk_rows=chunk, block_rows=block, tile_rows=tile, num_threads=min(num_threads, -(-block // tile)))


def sweep(
    sides: Sequence[Side], maths: Sequence[RowMaths], gradients: Gradients, sizes: Sizes, workspace: Workspace
) -> list[RowValues]:
    """Work through every row, and fill the gradients that are wanted.

    Args:
        sides: the student first; a teacher may have another vocabulary, if the maths takes it.
        maths: one for each thread, with scratch of its own.

    Returns:
        Values of all rows, in order.
    """
    student = sides[0]
    num_rows, vocabulary_size, device = len(student.hidden_RD), student.head.vocabulary_size, student.hidden_RD.device
    width = _ALIGNMENT if sizes.in_place else 1  # whose multiples rows are as wide as
    whole_products = [
        workspace.matrix(
            f"product {n}",
            sizes.block_rows,
            -(-side.head.vocabulary_size // width) * width,
            dtype=side.product_dtype,
            device=device,
        )
        for n, side in enumerate(sides)
    ]
    products = [
        product_BV[:, : side.head.vocabulary_size] for side, product_BV in zip(sides, whole_products, strict=True)
    ]
    gradient_CV = None
    if gradients.is_wanted and sizes.in_place:
        gradient_CV = whole_products[0].view(student.hidden_RD.dtype)[:, :vocabulary_size]
    elif gradients.is_wanted:
        gradient_CV = workspace.matrix(
            "logit gradient", sizes.chunk_rows, vocabulary_size, dtype=student.hidden_RD.dtype, device=device
        )
    values: list[RowValues] = []
    for chunk in spans(num_rows, sizes.chunk_rows, multiple=sizes.multiple):
        for block in spans(chunk.stop - chunk.start, sizes.block_rows, multiple=sizes.multiple):
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            block_products = [product_BV[: rows.stop - rows.start] for product_BV in products]
            for side, product_BV in zip(sides, block_products, strict=True):
                logits_into(product_BV, side.hidden_RD[rows], side.head.weight_VD, workspace)
            gradient_BV = None if gradient_CV is None else gradient_CV[block]
            values += _block(rows, block_products, gradient_BV, maths, sizes.tile_rows)
        if gradient_CV is not None:
            _chain_rule(student, chunk, gradient_CV[: chunk.stop - chunk.start], gradients)
    return values


def _block(
    rows: slice, products: Sequence[Tensor], gradient_BV: Tensor | None, maths: Sequence[RowMaths], tile_rows: int
) -> list[RowValues]:
    """Elementwise work on one block: each thread has a share of its rows."""
    num_rows = rows.stop - rows.start
    shares = spans(num_rows, -(-num_rows // len(maths)))
    return run_each(
        [
            partial(
                _share,
                slice(rows.start + share.start, rows.start + share.stop),
                [product_BV[share] for product_BV in products],
                None if gradient_BV is None else gradient_BV[share],
                maths_of_thread,
                tile_rows,
            )
            for share, maths_of_thread in zip(shares, maths[: len(shares)], strict=True)
        ]
    )


def _share(
    rows: slice, products: Sequence[Tensor], gradient_BV: Tensor | None, maths: RowMaths, tile_rows: int
) -> RowValues:
    starts = range(rows.start, rows.stop, tile_rows)
    gradients = [None] * len(starts) if gradient_BV is None else torch.split(gradient_BV, tile_rows)
    products_by_tile = zip(*(torch.split(product_BV, tile_rows) for product_BV in products), strict=True)
    for start, tile_products, gradient_CV in zip(starts, products_by_tile, gradients, strict=True):
        maths.tile(slice(start, min(start + tile_rows, rows.stop)), tile_products, gradient_CV)
    return maths.end_block(products)


def _chain_rule(student: Side, rows: slice, gradient_CV: Tensor, gradients: Gradients) -> None:
    """From the gradient of a chunk's products to that of its rows and of the weight."""
    if gradients.hidden_RD is not None:
        hidden_gradient_into(gradients.hidden_RD[rows], gradient_CV, student.head.weight_VD)
    if gradients.weight_VD is not None:
        weight_gradient_into(gradients.weight_VD, gradient_CV, student.hidden_RD[rows], adds=rows.start > 0)
