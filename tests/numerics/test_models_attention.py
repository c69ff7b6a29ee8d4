"""Packed attention is causal attention of each sequence alone, against a dense float64 formula."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig

from kdmesh.errors import ConfigError
from kdmesh.models import attention
from kdmesh.models.attention import packed_attention

HEADS, KEY_HEADS, DIM, VALUE_DIM = 6, 2, 8, 4


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    cap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same by the textbook: one [T, T] mask over everything."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(owner))
    distance = place[:, None] - place[None, :]
    visible = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(groups, 1)) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(-1, -1, len(owner), -1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(owner)]
    return torch.einsum("bhqk,bhkd->bqhd", weights, value.repeat_interleave(groups, 1))


def states(tokens: int, *, value_dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return (
        torch.randn(1, HEADS, tokens, DIM, dtype=torch.float64, requires_grad=True),
        torch.randn(1, KEY_HEADS, tokens, DIM, dtype=torch.float64, requires_grad=True),
        torch.randn(1, KEY_HEADS, tokens, value_dim, dtype=torch.float64, requires_grad=True),
    )


def sink_logits() -> Tensor:
    return torch.linspace(-2, 3, HEADS, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_values_and_gradients_equal_the_dense_formula(
    window: int | None, cap: float | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    lengths = (5, 1, 13, 2, 13)
    inputs = states(sum(lengths))
    expected = dense(*inputs, lengths, 0.3, window, cap)
    actual, _ = packed_attention(
        nn.Identity(), *inputs, None, scaling=0.3, softcap=cap, sliding_window=window, packed_lengths=lengths
    )
    assert actual.shape == expected.shape
    # With a soft cap the softmax is float32, as in transformers.
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if cap is None else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual, expected, **tolerance)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("value_dim", [VALUE_DIM, DIM, 20])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_sinks_join_the_denominator_and_have_their_gradient(
    window: int | None, value_dim: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    lengths = (5, 1, 13, 2, 13)
    inputs = *states(sum(lengths), value_dim=value_dim), sink_logits()
    expected = dense(*inputs[:3], lengths, 0.3, window, None, inputs[3])
    actual, _ = packed_attention(
        nn.Identity(), *inputs[:3], None, scaling=0.3, s_aux=inputs[3], sliding_window=window, packed_lengths=lengths
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_queries_after_the_first_keys_have_sinks_too(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 4)
    query, key, value = states(24)
    inputs = query, key, value, sink_logits()
    told = {"sliding_window": window, "packed_lengths": (11, 2, 5), "packed_before": 6}
    actual, _ = packed_attention(nn.Identity(), query[:, :, 6:], key, value, None, s_aux=inputs[3], **told)
    expected = dense(query, key, value, (17, 2, 5), DIM**-0.5, window, None, inputs[3])[:, 6:]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("value_dim", [VALUE_DIM, DIM])
def test_sinks_keep_attention_in_the_kernel_that_forms_no_square(window: int | None, value_dim: int) -> None:
    inputs = *states(900, value_dim=value_dim), sink_logits()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # torch refuses what would need another one
        outputs, _ = packed_attention(
            nn.Identity(), *inputs[:3], None, s_aux=inputs[3], sliding_window=window, packed_lengths=(900,)
        )
    outputs.sum().backward()
    assert inputs[3].grad is not None


@pytest.mark.parametrize("window", [None, 3])
def test_keys_that_no_kernel_reads_as_shared_are_repeated(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = set()
    fused = attention.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, value: Tensor, **told: Any) -> Tensor:
        heads.add((query.shape[1], key.shape[1], value.shape[1]))
        return fused(query, key, value, **told)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(attention, "_reads_shared_keys", lambda *_: False)  # as on a GPU in float32
    lengths = (5, 1, 13)
    inputs = states(sum(lengths))
    expected = dense(*inputs, lengths, 0.3, window, None)
    actual, _ = packed_attention(
        nn.Identity(), *inputs, None, scaling=0.3, sliding_window=window, packed_lengths=lengths
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert heads == {(HEADS, HEADS, HEADS)}


def test_values_may_be_narrower_than_keys() -> None:
    inputs = states(7, value_dim=VALUE_DIM)
    actual, _ = packed_attention(nn.Identity(), *inputs, None, packed_lengths=(3, 4))
    torch.testing.assert_close(actual, dense(*inputs, (3, 4), DIM**-0.5, None, None), rtol=1e-10, atol=1e-12)


def test_a_window_that_only_the_layer_knows_is_honoured() -> None:
    layer = nn.Identity()
    layer.sliding_window = 2
    inputs = states(9)
    actual, _ = packed_attention(layer, *inputs, None, packed_lengths=(9,))
    torch.testing.assert_close(actual, dense(*inputs, (9,), DIM**-0.5, 2, None), rtol=1e-10, atol=1e-12)
    full, _ = packed_attention(layer, *inputs, None, packed_lengths=(9,), sliding_window=None)
    torch.testing.assert_close(full, dense(*inputs, (9,), DIM**-0.5, None, None), rtol=1e-10, atol=1e-12)


def test_another_sequence_changes_no_bit() -> None:
    query, key, value = (part.detach().clone() for part in states(12))
    before, _ = packed_attention(nn.Identity(), query, key, value, None, packed_lengths=(5, 7))
    for part in (query, key, value):
        part[:, :, :5] = 1e6
    after, _ = packed_attention(nn.Identity(), query, key, value, None, packed_lengths=(5, 7))
    assert torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("formula", [None, "varlen"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lengths", [(17,), (17, 2, 5)])
def test_queries_after_the_first_keys_see_those_too(
    lengths: tuple[int, ...], window: int | None, formula: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_the_formula)
    monkeypatch.setattr("kdmesh.models.attention._BLOCK", 4)
    query, key, value = states(sum(lengths))
    before, own = 6, (lengths[0] - 6, *lengths[1:])
    starts = None if formula is None else torch.tensor([0, *np.cumsum(own)], dtype=torch.int32)
    told = {"sliding_window": window, "packed_lengths": own, "packed_starts": starts, "packed_before": before}
    actual, _ = packed_attention(nn.Identity(), query[:, :, before:], key, value, None, **told)
    expected = dense(query, key, value, lengths, DIM**-0.5, window, None)[:, before:]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_what_it_cannot_do_is_refused() -> None:
    inputs = states(4)
    with pytest.raises(ConfigError, match="packed_lengths"):
        packed_attention(nn.Identity(), *inputs, None)
    with pytest.raises(ConfigError, match=r"dropout 0\.1"):
        packed_attention(nn.Identity(), *inputs, None, dropout=0.1, packed_lengths=(4,))
    with pytest.raises(ConfigError, match="mask"):
        packed_attention(nn.Identity(), *inputs, torch.ones(1, 1, 4, 4), packed_lengths=(4,))
    told = {"packed_lengths": (4,), "s_aux": sink_logits()}
    with pytest.raises(ConfigError, match=r"sinks .* none with capped scores"):
        packed_attention(nn.Identity(), *inputs, None, softcap=2.0, **told)
    with pytest.raises(ConfigError, match=r"sinks .* none with one call over all sequences"):
        packed_attention(nn.Identity(), *inputs, None, packed_starts=torch.tensor([0, 4], dtype=torch.int32), **told)


def by_the_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of varlen_attn, which itself runs on GPUs alone.

    The last query of a sequence is at its last key, which is FlashAttention's rule since 2.1.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    ahead = len(key) - len(query)
    assert torch.equal(cu_seq_k[1:], cu_seq_q[1:] + ahead)
    lengths = tuple(cu_seq_k.diff().tolist())
    assert (max_q, max_k, enable_gqa) == (int(cu_seq_q.diff().max()), max(lengths), True)
    before, after = window_size
    assert after == 0
    window = None if before == -1 else before + 1
    whole = torch.cat([query.new_zeros(ahead, *query.shape[1:]), query])
    states = (part.transpose(0, 1)[None] for part in (whole, key, value))
    return dense(*states, lengths, scale, window, None)[0, ahead:]


def by_the_formula_of_2_11(
    query: Tensor, key: Tensor, value: Tensor, *packed: Any, scale: float, window_size: tuple[int, int]
) -> Tensor:
    """As torch 2.11 has it: every query head with a key head of its own."""
    assert key.shape[1] == value.shape[1] == query.shape[1]
    return by_the_formula(query, key, value, *packed, scale=scale, window_size=window_size, enable_gqa=True)


@pytest.mark.parametrize("formula", [by_the_formula, by_the_formula_of_2_11])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_one_call_for_all_sequences_is_told_what_each_alone_is(
    window: int | None, formula: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", formula)
    lengths = (5, 1, 13)
    inputs = states(sum(lengths))
    settings = {"scaling": 0.3, "sliding_window": window, "packed_lengths": lengths}
    each, _ = packed_attention(nn.Identity(), *inputs, None, **settings)
    starts = torch.tensor([0, 5, 6, 19], dtype=torch.int32)
    together, _ = packed_attention(nn.Identity(), *inputs, None, packed_starts=starts, **settings)
    assert together.shape == each.shape
    torch.testing.assert_close(together, each, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "dtype", "device", "words"),
    [
        ({}, torch.bfloat16, "cpu", "the device is a cpu"),
        ({}, torch.float32, "cuda", "computes in torch.float32"),
        ({"head_dim": 12}, torch.bfloat16, "cuda", r"sizes \[12\]"),
        ({"head_dim": 512}, torch.bfloat16, "cuda", r"sizes \[512\]"),
        ({"attn_logit_softcapping": 2.0}, torch.bfloat16, "cuda", "caps its scores"),
        ({"model_type": "gpt_oss"}, torch.bfloat16, "cuda", "has attention sinks"),
        ({}, torch.bfloat16, "cuda", None),
    ],
)
def test_a_model_that_flash_attention_cannot_run_is_told_why(
    change: dict[str, object], dtype: torch.dtype, device: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = AutoConfig.for_model(**{"model_type": "qwen3", "head_dim": 64, **change})
    refusal = attention.varlen_refusal(config, dtype, torch.device(device))
    assert refusal is None if words is None else re.search(words, refusal or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if words is None:
        assert "capability (7, 5)" in str(attention.varlen_refusal(config, dtype, torch.device(device)))
