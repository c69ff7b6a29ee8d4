"""Packed attention for a row whose tokens lie in slices on several ranks.

By heads, each rank gets all tokens of its share of the heads, attends, and hands the outputs back to whoever holds the
tokens. By keys, each rank attends for its own tokens, with the keys and values that ranks before it hold of the
sequence in whose midst its slice begins.

Sources: DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509, for heads. Llama 3, Grattafiori et al. 2024,
arXiv:2407.21783, section 3.3.2, for keys; it gathers those of the whole row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.attention import packed_attention, window_of
from kdmesh.models.context import ContextGroup, Exchange
from kdmesh.models.packing import slices_of


def attention_by_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    context: ContextGroup | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; arguments and result as for packed_attention, of this rank's slice of T.

    Collective of the context group, as is its backward pass.

    Args:
        context: who holds the row; it divides the heads. Key heads that it does not divide are repeated.
        s_aux: [heads] sinks, of all heads; the gradient is that of this rank's share of them, over all tokens.
        **kwargs: those of packed_attention; `packed_lengths` and `packed_starts` of the whole row, over all slices.

    Raises:
        ConfigError: the model cannot be run this way.
    """
    context = _told(module, context)
    heads, key_heads = query.shape[1], key.shape[1]
    if heads % context.size:
        raise ConfigError(f"{type(module).__name__} has {heads} heads, which {context.size} ranks cannot share equally")
    # The fewest that ranks can share equally; both numbers divide the heads, so this one does.
    repeats = math.lcm(key_heads, context.size) // key_heads
    if repeats > 1:
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    query, key, value = _all_tokens(context, query, key, value)
    sinks = None if s_aux is None else s_aux.chunk(context.size)[context.place]
    outputs, _ = packed_attention(module, query, key, value, attention_mask, s_aux=sinks, **kwargs)
    return _all_heads(context, outputs), None


def attention_by_keys(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    context: ContextGroup | None = None,
    packed_lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; arguments and result as for packed_attention, of this rank's slice of T.

    Collective of the context group, as is its backward pass.

    Args:
        context: who holds the row.
        packed_lengths: those of the whole row, over all slices.
        **kwargs: those of packed_attention; `packed_starts` of the sequences in this rank's slice.

    Raises:
        ConfigError: the model cannot be run this way.
    """
    context = _told(module, context)
    slices, window = slices_of(packed_lengths, context.size), window_of(module, kwargs)
    seen = [each.before if window is None else min(each.before, window - 1) for each in slices]
    if any(seen):
        key, value = _with_seen(context, seen, key, value)
    return packed_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        packed_lengths=slices[context.place].lengths,
        packed_before=seen[context.place],
        **kwargs,
    )


def use_context_attention(model: PreTrainedModel, exchange: Exchange) -> None:
    """Let every forward of `model` be told a `context`, in place."""
    model.set_attn_implementation(_NAMES[exchange])


def _told(module: nn.Module, context: ContextGroup | None) -> ContextGroup:
    if context is None:
        raise ConfigError(f"{type(module).__name__} was not told who holds the other tokens of the row")
    return context


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


def _with_seen(context: ContextGroup, seen: list[int], *states: Tensor) -> list[Tensor]:
    """[1, heads, seen + T / size, dim] of each [1, heads, T / size, dim]: with the tokens before this rank's slice.

    Args:
        seen: how many tokens each rank sees of those before its slice.
    """
    own_TX = torch.cat([each[0].transpose(0, 1).flatten(1) for each in states], dim=1)
    length = len(own_TX)

    def sent(place: int, to: int) -> int:
        """Of the slice at `place` those that the one at `to`, which begins `to - place - 1` slices later, sees."""
        return max(0, min(length, seen[to] - (to - place - 1) * length)) if place < to else 0

    ranks = range(context.size)
    before_SX = context.send_last(
        own_TX,
        sent=[sent(context.place, to) for to in ranks],
        received=[sent(place, context.place) for place in ranks],
    )
    parts = torch.split(torch.cat([before_SX, own_TX]), [each.shape[1] * each.shape[3] for each in states], dim=1)
    return [
        part.view(len(part), each.shape[1], each.shape[3]).transpose(0, 1)[None]
        for part, each in zip(parts, states, strict=True)
    ]


# No mask function is registered under these names: transformers then makes no mask at all.
_NAMES: dict[Exchange, str] = {"heads": "kdmesh_by_heads", "keys": "kdmesh_by_keys"}
AttentionInterface.register(_NAMES["heads"], attention_by_heads)
AttentionInterface.register(_NAMES["keys"], attention_by_keys)
