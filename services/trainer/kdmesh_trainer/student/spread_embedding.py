"""An input embedding of which every rank has the rows of its own tokens: the other half of a tied head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from kdmesh.errors import ConfigError
from kdmesh.losses import VocabularyShare

_TOKENS = 8192  # that all ranks together look up at a time


def plain_embedding(embedding: nn.Module) -> nn.Embedding:
    """The same module. Raises ConfigError when it changes its rows while it looks them up."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        raise ConfigError(
            f"parallel.head vocabulary: the student's head is its input embedding too, a {type(embedding).__name__}, "
            "and only a plain embedding can be spread over ranks"
        )
    return embedding


def spread_embedding(embedding: nn.Embedding, share: VocabularyShare, dtype: torch.dtype) -> None:
    """Have the module look its tokens up where their rows are, in place; collective from then on, as is its backward.

    Its weight is a shard by tokens. The rows come as `dtype`, and their gradient is that of the mean over ranks, as
    that of `fused_linear_across_ranks` is.
    """
    padding, embedding.padding_idx = embedding.padding_idx, None
    plain = copy.copy(embedding)  # of the same parameters and buffers, with the family's own forward, which may scale

    def forward(token_ids: Tensor) -> Any:
        weight = embedding.weight
        assert isinstance(weight, DTensor)
        asked = token_ids.flatten(), share, padding, dtype
        rows_TD = _Lookup.apply(weight.to_local(), *asked)  # type: ignore[no-untyped-call]
        # Told that these rows are its weight, it takes the first for the first token, and so on.
        places = torch.arange(len(rows_TD), device=rows_TD.device).view(token_ids.shape)
        return functional_call(plain, {"weight": rows_TD}, (places,))

    embedding.forward = forward  # type: ignore[method-assign, assignment]


class _Lookup(torch.autograd.Function):
    """The rows of this rank's tokens, wherever they are."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: Tensor,
        token_ids_T: Tensor,
        share: VocabularyShare,
        padding: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """[T, D] of type `dtype`; the token `padding` gets no gradient."""
        counts = [count for (count,) in share.numbers(len(token_ids_T))]
        rows_TD = weight_VD.new_empty(len(token_ids_T), weight_VD.shape[1], dtype=dtype)
        ctx.tokens = []
        for own, taken in share.rounds(counts, _TOKENS):
            tokens_N = share.gather(token_ids_T[own], taken)
            rows_TD[own] = share.add_up(_rows(weight_VD, tokens_N - share.first), taken).to(dtype)
            ctx.tokens.append(tokens_N)
        ctx.share, ctx.counts, ctx.padding, ctx.like = share, counts, padding, weight_VD.new_empty(0)
        ctx.shape = weight_VD.shape
        return rows_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Of the rows that this rank has, from the tokens of all ranks."""
        share, (num_rows, size) = ctx.share, ctx.shape
        sums_VD = ctx.like.new_zeros(num_rows + 1, size)  # the last is for tokens of other ranks
        for (own, taken), tokens_N in zip(share.rounds(ctx.counts, _TOKENS), ctx.tokens, strict=True):
            gradient_ND = share.gather(gradient_TD[own], taken).to(sums_VD.dtype)
            places_N = tokens_N - share.first
            is_elsewhere_N = (places_N < 0) | (places_N >= num_rows)
            if ctx.padding is not None:
                is_elsewhere_N |= tokens_N == ctx.padding
            places_N.masked_fill_(is_elsewhere_N, num_rows)
            if sums_VD.device.type == "cpu":
                sums_VD.index_add_(0, places_N, gradient_ND)
            else:  # the same sums in the same order every time, which index_add_ does not promise there
                sums_VD.index_put_((places_N,), gradient_ND, accumulate=True)
        return sums_VD[:num_rows].div_(share.num_ranks), None, None, None, None


def _rows(weight_VD: Tensor, places_N: Tensor) -> Tensor:
    """[N, D] of the places that are in the weight, zeros for the others."""
    if len(weight_VD) == 0:
        return weight_VD.new_zeros(len(places_N), weight_VD.shape[1])
    is_here_N = (places_N >= 0) & (places_N < len(weight_VD))
    rows_ND = weight_VD.index_select(0, places_N.clamp(0, len(weight_VD) - 1))
    return rows_ND.mul_(is_here_N[:, None])
