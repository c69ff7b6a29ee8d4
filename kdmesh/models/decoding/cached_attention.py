"""Causal attention for decoding: whole prompts when they join, then one token of every row at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kdmesh.errors import ConfigError
from kdmesh.models.attention import packed_attention, window_of
from kdmesh.models.decoding.kv_cache import KvCache

CACHED_ATTENTION = "kdmesh_cached"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """A forward over prompts laid end to end, which begin the given rows."""

    cache: KvCache
    rows: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of each


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NextTokens:
    """A forward over one token for each of the first B rows."""

    cache: KvCache
    lengths_B: Tensor  # [B] int64, tokens that the row holds already
    longest: int  # the largest of them
    is_even: bool  # whether they are all the same


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    decoding: Prompts | NextTokens | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; arguments and result as for packed_attention, with `decoding` instead of
    packed_lengths. Stores keys and values.

    Raises:
        ConfigError: the model cannot be run this way.
    """
    layer = getattr(module, "layer_idx", None)
    if decoding is None or layer is None or attention_mask is not None:
        raise ConfigError(f"{type(module).__name__} does not pass on what decoding needs")
    if isinstance(decoding, Prompts):
        _store(layer, decoding, key, value)
        return packed_attention(
            module, query, key, value, None, dropout, scaling, softcap, s_aux, packed_lengths=decoding.lengths, **kwargs
        )
    window = window_of(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = decoding.cache.append(layer, decoding.lengths_B, key[0], value[0])
    used = decoding.longest + 1
    visible = _visible(decoding, used, window)
    outputs = _attend(
        query[0].transpose(0, 1)[:, :, None], keys[:, :, :used], values[:, :, :used], visible, scale, softcap, s_aux
    )
    return outputs[:, :, 0][None], None


def _store(layer: int, prompts: Prompts, key: Tensor, value: Tensor) -> None:
    lengths = list(prompts.lengths)
    parts = zip(prompts.rows, torch.split(key[0], lengths, dim=1), torch.split(value[0], lengths, dim=1), strict=True)
    for row, keys, values in parts:
        prompts.cache.write(layer, row, keys, values)


def _visible(decoding: NextTokens, used: int, window: int | None) -> Tensor | None:
    """[B, 1, 1, used] bool: which tokens of its row each query sees; None where that is all of them."""
    if decoding.is_even and (window is None or window >= used):
        return None
    places = torch.arange(used, device=decoding.lengths_B.device)
    last_B1 = decoding.lengths_B[:, None]
    visible = places <= last_B1
    if window is not None:
        visible &= places > last_B1 - window
    return visible[:, None, None]


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, heads, 1, value dim] of queries [B, heads, 1, dim]."""
    rows, heads, _, _ = query.shape
    key_heads = keys.shape[1]
    # Query heads that share a key head become more queries of it: nothing is repeated. With `enable_gqa` and a mask a
    # GPU, up to torch 2.13, would repeat all keys and values for each query head, in float32.
    grouped = query.reshape(rows, key_heads, heads // key_heads, -1)
    if softcap is None and sinks is None:
        outputs = scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=scale)
    else:
        scores = grouped @ keys.transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        outputs = _weights(scores, sinks).to(query.dtype) @ values
    return outputs.reshape(rows, heads, 1, -1)


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, key heads, heads of each, used] of scores of that shape: what is left of 1 the sinks have."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return scores.softmax(-1, dtype=dtype)
    own = sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1).expand(len(scores), -1, -1, -1)
    return torch.cat([scores, own], dim=-1).softmax(-1, dtype=dtype)[..., :-1]


# No mask function is registered under this name: transformers then makes no mask at all.
AttentionInterface.register(CACHED_ATTENTION, cached_attention)
