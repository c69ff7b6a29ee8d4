"""Attention of one new token of every row to the tokens that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdmesh.models.decoding.cached_attention import NextTokens, Prompts, cached_attention
from kdmesh.models.decoding.kv_cache import KvCache
from tests.support.tensor_watch import TensorWatch

HEADS, KEY_HEADS, DIM, VALUE_DIM = 6, 2, 8, 5


def dense(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """[heads, value dim] of the last token of one sequence: query [heads, dim], keys [key heads, tokens, dim]."""
    keys, values = (states.repeat_interleave(HEADS // KEY_HEADS, dim=0) for states in (keys, values))
    if window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    scores = (keys @ query.unsqueeze(-1))[..., 0] * DIM**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    share = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    if sinks is not None:
        share = share * torch.sigmoid(scores.logsumexp(-1) - sinks)[:, None]
    return (share.unsqueeze(1) @ values)[:, 0]


def layer() -> nn.Module:
    module = nn.Identity()
    module.layer_idx = 0  # type: ignore[assignment]
    return module


def states(heads: int, tokens: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, dim, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, None), (2.0, None), (None, torch.linspace(-2, 3, HEADS, dtype=torch.float64))]
)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [(4, 4), (7, 2)])
def test_new_tokens_see_what_the_dense_formula_says(
    lengths: tuple[int, ...], window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    cache, total = KvCache(rows=2, tokens=8), sum(lengths)
    told = {"softcap": softcap, "sliding_window": window, "s_aux": sinks}
    prompt = states(HEADS, total, DIM, 1), states(KEY_HEADS, total, DIM, 2), states(KEY_HEADS, total, VALUE_DIM, 3)
    cached_attention(layer(), *prompt, None, decoding=Prompts(cache=cache, rows=(0, 1), lengths=lengths), **told)
    new = states(HEADS, 2, DIM, 4), states(KEY_HEADS, 2, DIM, 5), states(KEY_HEADS, 2, VALUE_DIM, 6)
    step = NextTokens(
        cache=cache, lengths_B=torch.tensor(lengths), longest=max(lengths), is_even=len(set(lengths)) == 1
    )
    outputs, _ = cached_attention(layer(), *new, None, decoding=step, **told)
    kept = [torch.split(both[0], list(lengths), dim=1) for both in prompt[1:]]
    for row in range(2):
        keys, values = (
            torch.cat([old[row], fresh[0, :, row : row + 1]], dim=1) for old, fresh in zip(kept, new[1:], strict=True)
        )
        torch.testing.assert_close(outputs[0, row], dense(new[0][0, :, row], keys, values, window, softcap, sinks))


@pytest.mark.parametrize("lengths", [(300, 300), (300, 7)])
def test_no_keys_are_repeated_where_torch_has_no_kernel_that_reads_shared_ones(lengths: tuple[int, ...]) -> None:
    cache = KvCache(rows=2, tokens=320)
    step = NextTokens(
        cache=cache, lengths_B=torch.tensor(lengths), longest=max(lengths), is_even=len(set(lengths)) == 1
    )
    new = states(HEADS, 2, DIM, 1), states(KEY_HEADS, 2, DIM, 2), states(KEY_HEADS, 2, DIM, 3)
    cached_attention(layer(), *new, None, decoding=step)  # the cache takes its memory
    # As on a GPU, where the kernel that takes masks takes no shared keys.
    with sdpa_kernel([SDPBackend.MATH]), TensorWatch([*cache._layers[0]]) as watch:
        cached_attention(layer(), *new, None, decoding=step)
    assert watch.largest_bytes <= 2 * KEY_HEADS * 301 * DIM * 8
