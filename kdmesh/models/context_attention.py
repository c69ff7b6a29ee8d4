"""Packed attention for a row whose tokens lie in slices on several ranks.

Each rank gets all tokens of its share of the heads, attends, and hands the outputs back to whoever holds the tokens.

Source: DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.attention import packed_attention
from kdmesh.models.context import ContextGroup

CONTEXT_ATTENTION = "kdmesh_context"


def context_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    context: ContextGroup | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; arguments and result as for packed_attention, of this rank's slice of T.

    Collective of the context group, as is its backward pass.

    Args:
        context: who holds the row; it divides the heads. Key heads that it does not divide are repeated.
        **kwargs: `packed_lengths` are those of the whole row, over all slices.

    Raises:
        ConfigError: the model cannot be run this way.
    """
    if context is None:
        raise ConfigError(f"{type(module).__name__} was not told who holds the other tokens of the row")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads % context.size:
        raise ConfigError(f"{type(module).__name__} has {heads} heads, which {context.size} ranks cannot share equally")
    # The fewest that ranks can share equally; both numbers divide the heads, so this one does.
    repeats = math.lcm(key_heads, context.size) // key_heads
    if repeats > 1:
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    query, key, value = _all_tokens(context, query, key, value)
    outputs, _ = packed_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, **kwargs)
    return _all_heads(context, outputs), None


def use_context_attention(model: PreTrainedModel) -> None:
    """Let every forward of `model` be told a `context`, in place."""
    model.set_attn_implementation(CONTEXT_ATTENTION)


def _all_tokens(context: ContextGroup, *states: Tensor) -> list[Tensor]:
    """[1, heads / size, T, dim] of each [1, heads, T / size, dim]: this rank's share of the heads."""
    # All of them in one exchange: [size, T / size, numbers of one rank's heads].
    parts = [each[0].view(context.size, -1, *each.shape[2:]).transpose(1, 2).flatten(2) for each in states]
    received = context.exchange(torch.cat(parts, dim=2)).flatten(0, 1)
    shares = torch.split(received, [part.shape[2] for part in parts], dim=1)
    return [
        share.view(len(share), -1, each.shape[-1]).transpose(0, 1)[None]
        for share, each in zip(shares, states, strict=True)
    ]


def _all_heads(context: ContextGroup, outputs: Tensor) -> Tensor:
    """[1, T / size, heads, dim], contiguous, of [1, T, heads / size, dim]: this rank's slice of the tokens."""
    _, _, heads, dim = outputs.shape
    received = context.exchange(outputs[0].reshape(context.size, -1, heads * dim))
    return received.transpose(0, 1).reshape(1, -1, context.size * heads, dim)


# No mask function is registered under this name: transformers then makes no mask at all.
AttentionInterface.register(CONTEXT_ATTENTION, context_attention)
