"""The ranks that hold one row of tokens together, each a slice of it, and what they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Exchange: TypeAlias = Literal["heads", "keys"]
"""What ranks exchange so that each attends over whole sequences, see context_attention.py."""


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

    def send_last(self, rows_TX: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Hand the last `sent[p]` rows to rank p, the same ones to several; what came to this rank, by rank.

        Carries gradients, which go the other way, and are summed in float32 where several come.

        Args:
            rows_TX: as wide on every rank.
            received: rows that each rank hands to this one, as it knows as well.
        """
        others: Tensor = _SendLast.apply(rows_TX, tuple(sent), tuple(received), self.group)  # type: ignore[no-untyped-call]
        return others

    def move_rows(self, rows_RX: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Hand the first `sent[0]` rows to rank 0, the next `sent[1]` to rank 1; what came to this one, by rank.

        Args:
            rows_RX: of any type, as wide on every rank; carries no gradient.
            received: rows that each rank hands to this one, as it knows as well.
        """
        dtype = rows_RX.dtype
        # As bytes, because not every backend knows every type.
        own = rows_RX.contiguous().view(torch.uint8)
        return _move(own, sent, received, self.group).view(dtype)

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


class _SendLast(torch.autograd.Function):
    """The last rows to each rank; the gradient of a row is the sum of what comes from those who got it."""

    @staticmethod
    def forward(
        ctx: Any, rows_TX: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        """What came, by rank."""
        ctx.sent, ctx.received, ctx.group, ctx.num_rows = sent, received, group, len(rows_TX)
        return _move(torch.cat([rows_TX[len(rows_TX) - count :] for count in sent]), sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """What came of the gradients, in the rows' places."""
        came = _move(gradients.contiguous(), ctx.received, ctx.sent, ctx.group)
        wide = torch.promote_types(came.dtype, torch.float32)
        total_TX = came.new_zeros(ctx.num_rows, came.shape[1], dtype=wide)
        for part in torch.split(came, list(ctx.sent)):
            total_TX[ctx.num_rows - len(part) :] += part
        return total_TX.to(came.dtype), None, None, None


def _move(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    others = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(others, rows, list(received), list(sent), group=group)
    return others


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
