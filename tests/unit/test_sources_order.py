"""Steps walk through reshuffled epochs without loss or repetition, on any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.types import TokenSequence
from kdmesh_trainer.sections.batch_config import BatchConfig
from kdmesh_trainer.sources.order import step_indices
from kdmesh_trainer.sources.plan import StepPlanner

sizes = st.integers(1, 40)


def walk(steps: int, *, number: int, per_step: int, seed: int = 0) -> list[int]:
    return [i for step in range(steps) for i in step_indices(step, number=number, per_step=per_step, seed=seed)]


@given(sizes, sizes, st.integers(0, 5))
def test_every_epoch_has_every_sequence_once(number: int, per_step: int, seed: int) -> None:
    epochs = 4
    steps = -(-epochs * number // per_step)
    indices = walk(steps, number=number, per_step=per_step, seed=seed)
    assert len(indices) == steps * per_step
    for epoch in range(epochs):
        assert sorted(indices[epoch * number : (epoch + 1) * number]) == list(range(number))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [tuple(walk(1, number=50, per_step=50, seed=seed)) for seed in range(3)]
    orders += [tuple(step_indices(step, number=50, per_step=50, seed=0)) for step in range(1, 3)]
    assert len({*orders, tuple(range(50))}) == 6


def test_all_orders_are_equally_likely() -> None:
    orders = Counter(tuple(walk(1, number=3, per_step=3, seed=seed)) for seed in range(1200))
    assert len(orders) == 6
    assert min(orders.values()) > 140


def test_the_order_is_the_same_for_ever() -> None:
    # A saved run continues with these numbers; a change here breaks every checkpoint.
    assert step_indices(0, number=10, per_step=4, seed=0) == [3, 2, 1, 8]
    assert step_indices(2, number=10, per_step=4, seed=0) == [5, 9, 7, 4]


def sequences(number: int, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 60, number)
    return [
        TokenSequence(
            token_ids=np.full(length, index, np.int32), positions=np.arange(length // 3, length - 1, dtype=np.int32)
        )
        for index, length in enumerate(lengths.tolist())
    ]


@given(sizes, st.integers(1, 20), st.integers(1, 5), st.integers(0, 7))
def test_ranks_share_the_same_global_step(number: int, per_step: int, ranks: int, step: int) -> None:
    data = sequences(number)
    batch = BatchConfig(sequences=per_step, max_tokens=64)
    shares = [StepPlanner(data, batch, seed=1, rank=rank, ranks=ranks).share(step) for rank in range(ranks)]
    alone = StepPlanner(data, batch, seed=1, rank=0, ranks=1).share(step)
    trained = Counter(s.token_ids[0] for share in shares for group in share.micro_batches for s in group)
    assert trained == Counter(s.token_ids[0] for group in alone.micro_batches for s in group)
    assert trained == Counter(step_indices(step, number=number, per_step=per_step, seed=1))
    assert len({len(share.micro_batches) for share in shares}) == 1
    members = [s for share in shares for group in share.micro_batches for s in group]
    for share in (*shares, alone):
        assert share.num_tokens == sum(s.num_tokens for s in members)
        assert share.num_loss_tokens == sum(s.num_rows for s in members)
        assert all(sum(s.num_tokens for s in group) <= 64 for group in share.micro_batches)
