"""Attention sinks: one learned logit per query head, which joins the softmax's denominator and has no value.

Sources: gpt-oss, OpenAI 2025, arXiv:2508.10925, section 2; Xiao et al. 2023, arXiv:2309.17453, section 3.2, with a key
and a value in the logit's place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

WITH_SINKS = frozenset({"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})
"""Types of text models whose attention has sinks."""

_ALIGNED = 8  # components; kernels want heads of multiples of it


def with_sinks(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose attention without sinks is, up to the components added, the one with them.

    Each query has one component more, its head's sink over `scale`. One key before all others, which every query must
    see, has 1 there and a value of 0; the others have 0 there. So every kernel that computes attention, and its
    backward pass, does this too, and no score is formed outside of it.

    Args:
        query: [1, heads, L, head dim].
        key: [1, key heads, M, head dim]; key heads divides heads.
        value: [1, key heads, M, value dim].
        sinks: [heads]; carries the gradient.
        scale: factor on the scores.

    Returns:
        [1, heads, L, dim], [1, key heads, 1 + M, dim] and [1, key heads, 1 + M, dim], all of one dim, at least
        head dim + 1 and value dim: torch's kernel for CPUs takes no narrower values. What is added to values is 0.
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    dim = -(-max(head_dim + 1, value_dim) // _ALIGNED) * _ALIGNED
    logits = (sinks / scale).to(query.dtype).view(1, -1, 1, 1)
    first = key.new_zeros(1, key.shape[1], 1, dim)
    first[..., head_dim] = 1
    return (
        torch.cat([query, pad(logits, (0, dim - head_dim - 1)).expand(-1, -1, query.shape[2], -1)], dim=-1),
        torch.cat([first, pad(key, (0, dim - head_dim))], dim=2),
        pad(value, (0, dim - value_dim, 1, 0)),
    )
