"""Tokens are drawn with the probabilities that the parameters say, and no others."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.sampling import drawing
from kdmesh.sampling.drawing import Chance, Draw, draw
from kdmesh.sampling.seeds import seed_of
from kdmesh.types import Sampling

DRAWS = 4000


def sampling(**parameters: Any) -> Sampling:
    return Sampling(max_new_tokens=1, **parameters)


def logits(size: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def textbook(logits_V: Tensor, wanted: Sampling, seen: tuple[int, ...] = ()) -> np.ndarray:
    """[V] float64 probabilities, step by step as rollout.proto says."""
    z = logits_V.double().numpy().copy()
    for token in set(seen):
        z[token] = z[token] / wanted.repetition_penalty if z[token] > 0 else z[token] * wanted.repetition_penalty
    p = np.exp((z - z.max()) / wanted.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    if wanted.top_k:
        p[order[wanted.top_k :]] = 0
        p /= p.sum()
    if wanted.top_p < 1:
        reached = 0.0
        for token in order:
            if reached >= wanted.top_p:
                p[token] = 0
            reached += p[token]
    p[p < wanted.min_p * p.max()] = 0
    return p / p.sum()


def counts(logits_V: Tensor, wanted: Sampling, seen: tuple[int, ...] = ()) -> np.ndarray:
    """[V] how often each token came of DRAWS draws in one call, by evenly spread chances."""
    seen_S = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    draws = [Draw(sampling=wanted, chance=(n + 0.5) / DRAWS, seen_S=seen_S) for n in range(DRAWS)]
    tokens, _ = draw(logits_V.expand(DRAWS, -1), draws)
    return np.bincount(tokens, minlength=len(logits_V))


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"top_k": 6, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("parameters", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_evenly_spread_chances_give_every_token_its_share(parameters: dict[str, Any], seed: int) -> None:
    wanted, logits_V = sampling(**parameters), logits(seed=seed)
    expected = textbook(logits_V, wanted, seen=(2, 5, 7))
    found = counts(logits_V, wanted, seen=(2, 5, 7))
    # Exactly the tokens that are left, but for those whose share is below one draw.
    assert not found[expected == 0].any()
    assert np.abs(found - expected * DRAWS).max() <= 1.0 + 1e-3 * DRAWS / 100


@given(
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_only_tokens_that_truncation_leaves_are_drawn(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    wanted, logits_V = sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), logits(seed=seed)
    expected = textbook(logits_V, wanted)
    chances = (0.0, 1e-12, 0.25, 0.5, 0.999, 1 - 2**-53)
    tokens, _ = draw(logits_V.expand(len(chances), -1), [Draw(sampling=wanted, chance=c, seen_S=None) for c in chances])
    # A token on the edge of top_p may fall on either side of a rounding.
    near = textbook(logits_V, sampling(temperature=temperature, top_k=top_k, top_p=min(1.0, top_p + 1e-6), min_p=min_p))
    assert all(expected[token] > 0 or near[token] > 0 for token in tokens)


def test_a_seeds_draws_follow_the_distribution() -> None:
    """Chi-square over 12 tokens: 11 degrees of freedom, 31.3 is passed with probability 0.001."""
    logits_V, chance = logits(), Chance(5)
    draws = [Draw(sampling=sampling(), chance=chance.next(), seen_S=None) for _ in range(DRAWS)]
    tokens, _ = draw(logits_V.expand(DRAWS, -1), draws)
    expected = textbook(logits_V, sampling()) * DRAWS
    found = np.bincount(tokens, minlength=12)
    assert ((found - expected) ** 2 / expected).sum() < 31.3


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    def numbers(seed: int | None) -> list[float]:
        chance = Chance(seed)
        return [chance.next() for _ in range(5)]

    assert numbers(2**64 - 1) == numbers(2**64 - 1)
    assert numbers(3) != numbers(4)
    assert numbers(None) != numbers(None)
    assert numbers(5) != numbers(5 + 2**32)  # all 64 bits of a seed count


def test_seeds_of_other_purposes_and_numbers_have_nothing_in_common() -> None:
    told = [(purpose, seed, number) for purpose in ("a", "b") for seed in range(20) for number in range(20)]
    seeds = sorted(seed_of(*one) for one in told)
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 1000  # samples count up from them
    assert max(seeds) < 2**48


@pytest.mark.parametrize("parameters", [c for c in CASES if c and "repetition_penalty" not in c], ids=str)
def test_few_likeliest_tokens_at_first_change_no_share(
    parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, logits_V = sampling(**parameters), logits(40)
    all_at_once = counts(logits_V, wanted)
    for likeliest in (1, 3, 8):
        monkeypatch.setattr(drawing, "_LIKELIEST", likeliest)
        np.testing.assert_array_equal(counts(logits_V, wanted), all_at_once)


def test_a_rows_token_does_not_depend_on_its_neighbours() -> None:
    kinds = [sampling(), sampling(top_k=3), sampling(temperature=0), sampling(top_p=0.5, temperature=2.0)]
    rows_BV = torch.stack([logits(seed=n) for n in range(8)])
    draws = [Draw(sampling=kinds[n % 4], chance=0.1 * n + 0.05, seen_S=None) for n in range(8)]
    together, logprobs = draw(rows_BV, draws)
    for row in range(8):
        alone, alone_logprobs = draw(rows_BV[row : row + 1], draws[row : row + 1])
        assert (alone, alone_logprobs) == ([together[row]], [logprobs[row]])


def test_a_temperature_near_zero_is_the_likeliest_token() -> None:
    logits_V = logits() * 100
    for wanted in (sampling(temperature=1e-40), sampling(temperature=1e-40, top_p=0.9), sampling(temperature=0)):
        tokens, _ = draw(logits_V[None], [Draw(sampling=wanted, chance=0.999, seen_S=None)])
        assert tokens == [int(logits_V.argmax())]


def test_logprobs_ignore_temperature_truncation_and_penalty() -> None:
    logits_V = logits()
    wanted = sampling(temperature=0.3, top_k=2, repetition_penalty=5.0)
    tokens, logprobs = draw(logits_V[None], [Draw(sampling=wanted, chance=0.9, seen_S=torch.tensor([0, 1]))])
    assert logprobs[0] == pytest.approx(float(logits_V.log_softmax(0)[tokens[0]]), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "parameters", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 2.0}]
)
def test_from_logits_that_are_not_finite_nothing_is_drawn(parameters: dict[str, Any], bad: float) -> None:
    for places in ([3], list(range(12))):
        logits_V = logits()
        logits_V[places] = bad
        rows_BV = torch.stack([logits(), logits_V])
        one = Draw(sampling=sampling(**parameters), chance=0.5, seen_S=torch.tensor([0, 1]))
        with pytest.raises(EngineFailure, match="logits are not finite"):
            draw(rows_BV, [one, one])


def test_a_sure_token_has_no_positive_logprob() -> None:
    logits_V = torch.full((50_000,), -60.0)
    logits_V[7] = 40.0
    tokens, logprobs = draw(logits_V[None], [Draw(sampling=sampling(), chance=0.5, seen_S=None)])
    assert tokens == [7]
    assert logprobs[0] <= 0
