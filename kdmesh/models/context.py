"""The ranks that hold one row of tokens together, each a slice of it, and what they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContextGroup:
    """This process's place among the ranks that hold a row's tokens in equal slices, one after the other.

    Every method is a collective of the group: all its ranks must come to it, in the same order.
    """

    place: int  # of this rank's slice
    size: int  # ranks, at least 2
    group: dist.ProcessGroup

    def exchange(self, parts: Tensor) -> Tensor:
        """Hand part p of the first axis to rank p; what the ranks handed to this one, by rank.

        Carries gradients, which go the other way. The first axis is `size` long; all ranks have the same shape.
        """
        received: Tensor = _Exchange.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return received

    def move_rows(self, rows_RX: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Hand the first `sent[0]` rows to rank 0, the next `sent[1]` to rank 1; what came to this one, by rank.

        Args:
            rows_RX: of any type, as wide on every rank; carries no gradient.
            received: rows that each rank hands to this one, as it knows as well.
        """
        width, dtype = rows_RX.shape[1], rows_RX.dtype
        # As bytes, because not every backend knows every type.
        own = rows_RX.contiguous().view(torch.uint8)
        others = own.new_empty(sum(received), width * dtype.itemsize)
        dist.all_to_all_single(others, own, list(received), list(sent), group=self.group)
        return others.view(dtype)

    def tell(self, values: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, by rank; each tells as many. On the CPU: it never waits for a GPU."""
        own = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        return [told.tolist() for told in everyone]


class _Exchange(torch.autograd.Function):
    """All-to-all over the first axis; its gradient is the same of the gradients."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        """What came, by rank."""
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None]:
        """What came of the gradients, by rank."""
        return _all_to_all(gradients, ctx.group), None


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
