"""Causal attention over sequences laid end to end in one row, each seeing only itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PretrainedConfig

from kdmesh.errors import ConfigError
from kdmesh.models.attention_sinks import WITH_SINKS, with_sinks

PACKED_ATTENTION = "kdmesh_packed"

# Queries whose scores are formed together where a window or a soft cap rules out is_causal,
# so that memory grows with a sequence's length instead of its square.
_BLOCK = 512

# What FlashAttention computes for.
_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_VARLEN_CAPABILITY = (8, 0)
_VARLEN_HEAD_SIZE = 256


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_lengths: tuple[int, ...] | None = None,
    packed_starts: Tensor | None = None,
    packed_before: int = 0,
    packed_longest: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, for one row of sequences of `packed_lengths` tokens.

    Args:
        module: the attention layer; its sliding_window counts when the call names none.
        query: [1, heads, T, head dim].
        key: [1, key heads, packed_before + T, head dim]; key heads divides heads.
        value: [1, key heads, packed_before + T, value dim].
        attention_mask: None; there is no padding, and no [T, T] mask is ever made.
        dropout: 0.
        scaling: factor on the scores; None is 1 / sqrt(head dim).
        softcap: cap on the scores, as in Gemma 2.
        s_aux: [heads] sinks, as in gpt-oss (attention_sinks.py); not with `softcap` nor `packed_starts`.
        packed_lengths: tokens of each sequence; their sum is T.
        packed_starts: PackedTokens.starts on the same device, for one call of FlashAttention over all sequences, where
            `varlen_refusal` is None; None takes each sequence by itself.
        packed_before: keys of the first sequence that precede its first query; those of others begin with them.
        packed_longest: tokens of the longest sequence, for code that is compiled with `packed_starts` and must not
            depend on `packed_lengths`; not with `packed_before`. None: as these say.
        **kwargs: `sliding_window`; what else transformers passes has no effect here.

    Returns:
        [1, T, heads, value dim], contiguous.

    Raises:
        ConfigError: the model cannot be run this way.
    """
    if packed_lengths is None:
        raise ConfigError(f"{_name(module)} was not told packed_lengths: sequences in one row would see each other")
    if attention_mask is not None:
        raise ConfigError(f"{_name(module)} passes an attention mask: packed attention takes none")
    if s_aux is not None and (softcap is not None or packed_starts is not None):
        other = "capped scores" if packed_starts is None else "one call over all sequences"
        raise ConfigError(f"{_name(module)} has attention sinks (s_aux): packed attention has none with {other}")
    if dropout:
        raise ConfigError(f"{_name(module)} has attention dropout {dropout}: packed attention has none; set it to 0")
    window = window_of(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed_starts is not None:
        if packed_longest is None:
            longest = max(packed_lengths), max(packed_lengths[0] + packed_before, *packed_lengths)
        else:
            longest = packed_longest, packed_longest
        return _varlen(query, key, value, packed_starts, packed_before, *longest, scale=scale, window=window), None
    rules = _Rules(scale=scale, window=window, softcap=softcap, sinks=s_aux)
    # Split along an axis whose parts are contiguous in [1, T, heads, dim], so that joining outputs and
    # gradients copies whole rows. One split has one backward; slices would each fill a [T] of zeros.
    lengths = list(packed_lengths)
    key_lengths = [packed_before + lengths[0], *lengths[1:]]
    queries = torch.split(query.transpose(1, 2), lengths, dim=1)
    keys, values = (torch.split(states.transpose(1, 2), key_lengths, dim=1) for states in (key, value))
    outputs = [
        _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rules).transpose(1, 2)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def varlen_refusal(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a model cannot attend to all sequences of a row in one call; None: it can.

    Args:
        config: the model's.
        dtype: that it computes in.
    """
    text = config.get_text_config()
    heads = {getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads}
    heads |= {getattr(text, name, None) for name in ("qk_head_dim", "v_head_dim")} - {None}
    if device.type != "cuda":
        return f"the device is a {device.type}, and only GPUs have it"
    if torch.cuda.get_device_capability(device) < _VARLEN_CAPABILITY:
        return f"the GPU has compute capability {torch.cuda.get_device_capability(device)}, and it begins with 8.0"
    if dtype not in _VARLEN_DTYPES:
        return f"it computes in {dtype}, and only 16 bits have it"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "the model caps its scores"
    if text.model_type in WITH_SINKS:
        return "the model has attention sinks"
    if len(heads) > 1 or max(heads) > _VARLEN_HEAD_SIZE or max(heads) % 8:
        return f"heads have sizes {sorted(heads)}; they must have one, a multiple of 8 of at most {_VARLEN_HEAD_SIZE}"
    return None


def window_of(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """Tokens that a query sees, itself included; None when that is all before it."""
    # Some models (Qwen2-MoE in 5.23) put the window only on the layer: their own masks hold it, and we use none.
    window: int | None = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    return window


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    before: int,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """All sequences in one call, [1, T, heads, dim]; no sequence has more than `most_queries` and `most_keys`."""
    from torch.nn.attention.varlen import varlen_attn  # not at the top: it registers operators, which few need

    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    # The window of FlashAttention counts the tokens before a query, without itself; -1 are all of them.
    seen = -1 if window is None else window - 1
    # A sequence's last query is at its last key, also where it has more keys than queries.
    key_starts = torch.cat([starts[:1], starts[1:] + before]) if before else starts
    shared: dict[str, Any] = {}
    if _varlen_reads_shared_keys():
        shared["enable_gqa"] = True
    elif (copies := queries.shape[1] // keys.shape[1]) > 1:  # torch 2.11
        keys, values = (states.repeat_interleave(copies, dim=1) for states in (keys, values))
    output = varlen_attn(
        queries,
        keys,
        values,
        starts,
        key_starts,
        most_queries,
        most_keys,
        scale=scale,
        window_size=(seen, 0),
        **shared,
    )
    assert isinstance(output, Tensor)  # nothing else was asked for
    return output[None]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _varlen_reads_shared_keys() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return _has_parameter(varlen_attn, "enable_gqa")


@lru_cache(maxsize=8)  # every layer of every pass asks
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rules:
    """What a layer's attention is, but for its queries, keys and values; see packed_attention."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def _attend(query: Tensor, key: Tensor, value: Tensor, rules: _Rules) -> Tensor:
    """Causal attention of the last L tokens of one sequence, [1, heads, L, dim]."""
    length = query.shape[2]
    before, window = key.shape[2] - length, rules.window
    if rules.softcap is None and not before and (window is None or window >= length):
        return _fused(query, key, value, None, rules)
    # Masks are kept for the backward pass. Those that end within a sequence may be as long as it, and are made again.
    attend = partial(checkpoint, _attend_block, use_reentrant=False) if before else _attend_block
    return torch.cat(
        [
            attend(
                query[:, :, start:stop],
                key[:, :, first : before + stop],
                value[:, :, first : before + stop],
                rules,
            )
            for start, stop, first in _blocks(length, before, window)
        ],
        dim=2,
    )


def _blocks(length: int, before: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first query, one past the last query, first key that any of them sees) of each block."""
    for start in range(0, length, _BLOCK):
        yield start, min(start + _BLOCK, length), 0 if window is None else max(0, before + start - window + 1)


def _visible(offset: int, num_queries: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: query i stands at key offset + i, and sees itself and the window - 1 keys before it."""
    ones = torch.ones(num_queries, offset + num_queries, dtype=torch.bool, device=device).tril(offset)
    return ones if window is None else ones.triu(offset - window + 1)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, rules: _Rules) -> Tensor:
    """Attention of the last queries to all keys that one of them sees, [1, heads, queries, dim]."""
    visible = _visible(key.shape[2] - query.shape[2], query.shape[2], rules.window, query.device)
    if (softcap := rules.softcap) is None:
        return _fused(query, key, value, visible, rules)
    _, key_heads, num_keys, _ = key.shape
    # Query heads that share a key head become more queries of it: nothing is repeated.
    grouped = query.reshape(key_heads, -1, query.shape[-1])
    # The order of roundings is transformers' own, so that bfloat16 results agree.
    scores = torch.tanh(grouped @ key[0].transpose(1, 2) * rules.scale / softcap) * softcap
    scores = scores.view(1, query.shape[1], -1, num_keys).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights.view(key_heads, -1, num_keys) @ value[0]).view(1, *query.shape[1:3], value.shape[-1])


def _fused(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, rules: _Rules) -> Tensor:
    """torch's attention, causal where no mask is given; memory grows with a sequence's length on a GPU too."""
    if rules.sinks is None:
        return _fused_without_sinks(query, key, value, visible, rules.scale)
    value_dim = value.shape[-1]
    query, key, value = with_sinks(query, key, value, rules.sinks, rules.scale)
    if visible is None:
        # The first query sees the first key alone, which is the sinks': one more goes before those that count.
        outputs = _fused_without_sinks(pad(query, (0, 0, 1, 0)), key, value, None, rules.scale)[:, :, 1:]
    else:
        outputs = _fused_without_sinks(query, key, value, pad(visible, (1, 0), value=True), rules.scale)
    return outputs[..., :value_dim]


def _fused_without_sinks(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    if not _reads_shared_keys(query, value, visible) and (copies := query.shape[1] // key.shape[1]) > 1:
        key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
    )


def _reads_shared_keys(query: Tensor, value: Tensor, visible: Tensor | None) -> bool:
    """Whether a kernel of torch's reads keys that query heads share; else all scores would be formed at once.

    On a GPU FlashAttention alone does, up to torch 2.13.
    """
    if not query.is_cuda:
        return True
    has_sizes = query.shape[-1] == value.shape[-1] <= _VARLEN_HEAD_SIZE
    return visible is None and has_sizes and query.dtype in _VARLEN_DTYPES


# No mask function is registered under this name: transformers then makes no mask at all.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
# On Hopper and later torch would prefer cuDNN's attention, which plans for up to a second at every length that it has
# not seen; sequences have all lengths. For the whole process, whoever asks.
torch.backends.cuda.enable_cudnn_sdp(False)
