"""torch's attention to all sequences of a row, which has kernels for GPUs alone, on a CPU by its formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import varlen


def teach_cpus() -> None:
    """Let this process's CPU run the operators behind `varlen_attn`, forward and backward; once."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor]:
    assert max_q == max_k == int(starts.diff().max())
    assert torch.equal(starts, key_starts)
    assert scale is not None
    keys, values = (_for_each_head(states, query) for states in (key, value))
    scores = _scores(query, keys, starts, scale, window_size)
    output = _laid_out_as(query, torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return output, scores.logsumexp(-1), torch.zeros(2, dtype=torch.uint64)


def _backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    unused: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert scale is not None
    keys, values = (_for_each_head(states, query) for states in (key, value))
    scores = _scores(query, keys, starts, scale, window_size)
    weights = scores.softmax(-1)
    of_weights = torch.einsum("qhd,khd->hqk", upstream, values)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_keys = torch.einsum("hqk,qhd->khd", of_scores, query)
    of_values = torch.einsum("hqk,qhd->khd", weights, upstream)
    of_query = torch.einsum("hqk,khd->qhd", of_scores, keys)
    return (
        _laid_out_as(query, of_query),
        _laid_out_as(key, of_keys.unflatten(1, (key.shape[1], -1)).sum(2)),
        _laid_out_as(value, of_values.unflatten(1, (value.shape[1], -1)).sum(2)),
    )


def _for_each_head(states: Tensor, query: Tensor) -> Tensor:
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def _laid_out_as(given: Tensor, made: Tensor) -> Tensor:
    return torch.empty_like(given).copy_(made)


def _scores(query: Tensor, keys: Tensor, starts: Tensor, scale: float, window_size: list[int] | None) -> Tensor:
    """[heads, T, T], those that nobody sees at -inf."""
    assert window_size is not None
    place = torch.arange(len(query))
    sequence = torch.searchsorted(starts.long(), place, right=True)
    visible = (sequence[:, None] == sequence) & (place[:, None] >= place)
    if window_size[0] >= 0:
        visible &= place[:, None] - place <= window_size[0]
    return (torch.einsum("qhd,khd->hqk", query, keys) * scale).masked_fill(~visible, -torch.inf)
