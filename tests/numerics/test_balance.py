"""How near the plan of a step comes to perfect balance."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from kdmesh.batching import HOME_COST, plan_step


def busy_tokens(plan: list[list[tuple[int, ...]]], lengths: list[int]) -> int:
    """Token times of the step: at each k all ranks wait for the largest micro-batch."""
    return sum(max(sum(lengths[i] for i in m) for m in at_k) for at_k in zip(*plan, strict=True))


def realistic_lengths(seed: int, number: int, *, longest: int = 1200) -> list[int]:
    """Lengths of chats: log-normal, median 314 tokens, a tail that is cut."""
    draws = np.random.default_rng(seed).lognormal(5.75, 0.55, number)
    lengths: list[int] = np.clip(draws, 100, longest).astype(int).tolist()
    return lengths


def karmarkar_karp(lengths: list[int], parts: int) -> list[int]:
    """Loads of the largest differencing method without a cap, largest first."""
    heap = [(-x, n, [x] + [0] * (parts - 1)) for n, x in enumerate(lengths)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = sorted((x + y for x, y in zip(a, reversed(b), strict=True)), reverse=True)
        number += 1
        heapq.heappush(heap, (merged[-1] - merged[0], number, merged))
    return heap[0][2]


@pytest.mark.parametrize(
    ("number", "ranks", "max_tokens", "allowed"),
    [(32, 2, 8192, 1.002), (32, 2, 4096, 1.005), (64, 4, 4096, 1.01), (128, 8, 4096, 1.005), (512, 16, 8192, 1.002)],
)
def test_a_step_takes_hardly_longer_than_its_tokens_over_the_ranks(
    number: int, ranks: int, max_tokens: int, allowed: float
) -> None:
    for seed in range(30):
        lengths = realistic_lengths(seed, number)
        plan = plan_step(lengths, ranks=ranks, max_tokens=max_tokens)
        assert busy_tokens(plan, lengths) <= allowed * sum(lengths) / ranks


@pytest.mark.parametrize(("number", "ranks"), [(32, 2), (32, 8), (64, 8), (128, 8), (256, 64)])
def test_balance_is_no_worse_than_karmarkar_karp(number: int, ranks: int) -> None:
    ours, theirs = [], []
    for seed in range(30):
        lengths = realistic_lengths(seed, number)
        ours.append(busy_tokens(plan_step(lengths, ranks=ranks, max_tokens=10**6), lengths))
        theirs.append(karmarkar_karp(lengths, ranks)[0])
    assert np.mean(ours) <= 1.0005 * np.mean(theirs)  # both within a token of perfect in two large parts


def test_companions_of_one_very_long_sequence_are_filled_up() -> None:
    # One sequence of 1000 keeps every rank busy for 1000; what fits beside it is free.
    lengths = [1000] + [50] * 40
    plan = plan_step(lengths, ranks=2, max_tokens=1000)
    assert len(plan[0]) == 2
    assert busy_tokens(plan, lengths) == 1500


@pytest.mark.parametrize(
    ("number", "ranks", "max_tokens", "away"), [(32, 2, 4096, 0.15), (128, 8, 4096, 0.2), (512, 16, 8192, 0.1)]
)
def test_most_sequences_stay_at_home_in_a_plan_that_is_as_even(
    number: int, ranks: int, max_tokens: int, away: float
) -> None:
    parts = []
    for seed in range(20):
        lengths = realistic_lengths(seed, number)
        homes = [index // 4 % ranks for index in range(number)]  # four samples of each prompt
        plan = plan_step(lengths, ranks=ranks, max_tokens=max_tokens, homes=homes)
        moved = [i for rank, micro_batches in enumerate(plan) for m in micro_batches for i in m if homes[i] != rank]
        parts.append(sum(lengths[i] for i in moved) / sum(lengths))
        free = plan_step(lengths, ranks=ranks, max_tokens=max_tokens)
        assert busy_tokens(plan, lengths) <= HOME_COST * busy_tokens(free, lengths)
    assert np.mean(parts) <= away
