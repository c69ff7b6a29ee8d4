"""A blend keeps its proportions, walks each dataset through epochs, and follows from the number of the step alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kdmesh.types import TokenSequence
from kdmesh_trainer.data.blend import Blended, BlendOrder, Part, Proportions, parts_of
from kdmesh_trainer.sections.batch_config import BatchConfig
from kdmesh_trainer.sections.data_config import Blend, DataConfig
from kdmesh_trainer.sources.order import AnswerOrder, step_order
from kdmesh_trainer.sources.plan import StepPlanner

weights = st.lists(st.fractions(min_value=Fraction(1, 50), max_value=1), min_size=1, max_size=5).map(
    lambda numbers: [number / sum(numbers) for number in numbers]
)
sizes = st.integers(1, 30)


@st.composite
def blends(draw: st.DrawFn) -> Blended[tuple[int, int]]:
    """Items that say of which dataset they are, and which of it."""
    shares = draw(weights)
    return Blended(
        [
            Part(name=f"d{n}", weight=share, items=[(n, item) for item in range(draw(sizes))])
            for n, share in enumerate(shares)
        ]
    )


def walk(blended: Blended[Any], draws: int, *, per_step: int = 7, seed: int = 0) -> list[Any]:
    order = BlendOrder(blended, per_step=per_step, seed=seed)
    steps = -(-draws // per_step)
    return [blended[index] for step in range(steps) for index in order.of_step(step)][:draws]


@given(weights, st.integers(0, 10**6))
def test_counts_are_less_than_one_from_the_weights_after_any_number_of_draws(
    shares: list[Fraction], draws: int
) -> None:
    counts = Proportions(shares).counts(draws)
    assert sum(counts) == draws
    assert all(abs(count - draws * share) < 1 for count, share in zip(counts, shares, strict=True))


@given(weights, st.integers(0, 10**4))
def test_no_count_falls_from_one_block_to_the_next(shares: list[Fraction], block: int) -> None:
    proportions = Proportions(shares)
    before, after = (proportions.counts(number * proportions.block) for number in (block, block + 1))
    assert all(more >= less for less, more in zip(before, after, strict=True))


@settings(max_examples=50)
@given(blends(), st.integers(0, 200), st.integers(1, 150))
def test_any_window_has_its_proportions(blended: Blended[tuple[int, int]], begin: int, length: int) -> None:
    drawn = Counter(dataset for dataset, _ in walk(blended, begin + length)[begin:])
    block = Proportions([part.weight for part in blended.parts]).block
    for dataset, part in enumerate(blended.parts):
        # Less than 1 at each end of a block, and at most what a block holds on each side of the window.
        most = 2 + 2 * (block * part.weight + 2)
        assert abs(drawn[dataset] - length * part.weight) <= most


@settings(max_examples=50)
@given(blends(), st.integers(0, 3))
def test_every_epoch_of_a_dataset_has_each_of_its_items_once(blended: Blended[tuple[int, int]], seed: int) -> None:
    drawn = walk(blended, 200, seed=seed)
    for dataset, part in enumerate(blended.parts):
        items = [item for found, item in drawn if found == dataset]
        number = len(part.items)
        for epoch in range(len(items) // number):
            assert sorted(items[epoch * number : (epoch + 1) * number]) == list(range(number))


@given(blends(), st.integers(1, 20), st.integers(1, 20), st.integers(0, 30))
def test_a_step_follows_from_its_number_alone(
    blended: Blended[tuple[int, int]], per_step: int, other: int, step: int
) -> None:
    whole = walk(blended, (step + 1) * per_step, per_step=other)
    resumed = BlendOrder(blended, per_step=per_step, seed=0).of_step(step)
    assert [blended[index] for index in resumed] == whole[step * per_step :]


@given(blends(), st.integers(1, 20), st.integers(0, 10))
def test_counts_are_those_of_the_step(blended: Blended[tuple[int, int]], per_step: int, step: int) -> None:
    order = BlendOrder(blended, per_step=per_step, seed=3)
    drawn = Counter(blended[index][0] for index in order.of_step(step))
    assert order.counts(step) == {part.name: drawn[n] for n, part in enumerate(blended.parts)}


@given(blends(), st.integers(1, 20))
def test_the_first_pass_has_every_item(blended: Blended[tuple[int, int]], per_step: int) -> None:
    order = step_order(blended, per_step=per_step, seed=0)
    assert {i for step in range(order.first_pass_steps) for i in order.of_step(step)} == set(range(len(blended)))


def test_the_first_pass_of_a_single_dataset_is_its_first_epoch() -> None:
    order = step_order(list(range(10)), per_step=4, seed=0)
    assert (order.first_pass_steps, order.counts(0)) == (3, {})


def test_datasets_blocks_epochs_and_seeds_are_shuffled_differently() -> None:
    halves = Blended([Part(name=name, weight=Fraction(1, 2), items=range(40)) for name in ("a", "b")])
    epochs = [BlendOrder(halves, per_step=80, seed=seed).of_step(step) for seed in range(2) for step in range(2)]
    walks = [[item % 40 for item in epoch if (item < 40) is side] for epoch in epochs for side in (True, False)]
    assert len(set(map(tuple, walks))) == 8
    assert {sides[0] < 40 for sides in zip(*[iter(epochs[0])] * 2, strict=True)} == {True, False}


def test_the_order_is_the_same_for_ever() -> None:
    # A saved run continues with these numbers; a change here breaks every checkpoint of a blend.
    blended = Blended(
        [
            Part(name="a", weight=Fraction(7, 10), items=range(10)),
            Part(name="b", weight=Fraction(3, 10), items=range(5)),
        ]
    )
    order = BlendOrder(blended, per_step=8, seed=0)
    assert order.of_step(0) == [14, 5, 1, 8, 7, 0, 6, 12]
    assert order.of_step(5) == [3, 5, 12, 5, 1, 13, 8, 3]


def test_a_blend_is_one_sequence_after_the_other() -> None:
    blended = Blended([Part(name=name, weight=Fraction(1, 2), items=name * 3) for name in "ab"])
    assert (len(blended), list(blended), blended[4], blended[-1]) == (6, list("aaabbb"), "b", "b")
    assert "".join(blended[1:5]) == "aabb"
    assert {name: len(items) for name, items in parts_of(blended).items()} == {"a": 3, "b": 3}
    assert parts_of("abc") == {"": "abc"}
    with pytest.raises(IndexError):
        blended[6]


def sequences(count: int, first: int) -> list[TokenSequence]:
    return [
        TokenSequence(token_ids=np.full(4 + n % 5, first + n, np.int32), positions=np.array([1, 2], np.int32))
        for n in range(count)
    ]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 9))
def test_any_number_of_ranks_shares_the_same_step(per_step: int, ranks: int, step: int) -> None:
    blended = Blended(
        [
            Part(name="a", weight=Fraction(3, 4), items=sequences(9, 100)),
            Part(name="b", weight=Fraction(1, 4), items=sequences(4, 200)),
        ]
    )
    batch = BatchConfig(sequences=per_step, max_tokens=16)
    shares = [StepPlanner(blended, batch, seed=1, rank=rank, ranks=ranks).share(step) for rank in range(ranks)]
    trained = Counter(int(s.token_ids[0]) for share in shares for group in share.micro_batches for s in group)
    indices = BlendOrder(blended, per_step=per_step, seed=1).of_step(step)
    assert trained == Counter(int(blended[index].token_ids[0]) for index in indices)
    assert len({tuple(share.datasets.items()) for share in shares}) == 1
    assert sum(shares[0].datasets.values()) == per_step


def test_answers_are_drawn_in_another_order_than_prompts() -> None:
    blended = Blended([Part(name=name, weight=Fraction(1, 2), items=sequences(20, n)) for n, name in enumerate("ab")])
    answers = AnswerOrder(blended, per_step=10, seed=0)
    prompts = step_order(blended, per_step=10, seed=0)
    assert [int(s.token_ids[0]) for s in answers.of_step(0)] != [
        int(blended[index].token_ids[0]) for index in prompts.of_step(0)
    ]
    assert answers.counts(0) == {"a": 5, "b": 5}


def blend(**datasets: Any) -> Blend:
    tree = {name: {"format": "chat", "path": f"{name}.jsonl", **keys} for name, keys in datasets.items()}
    return Blend.model_validate({"format": "blend", "datasets": tree})


def test_weights_are_proportions_and_decimal_fractions_are_exact() -> None:
    assert blend(a={"weight": 0.7}, b={"weight": 0.3}).shares == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert blend(a={"weight": 2}, b={"weight": 1e0}).shares == {"a": Fraction(2, 3), "b": Fraction(1, 3)}


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"a": {"weight": 0}}, "greater than 0"),
        ({"a": {"weight": -0.5}}, "greater than 0"),
        ({"a": {"weight": float("nan")}}, "finite"),
        ({"a": {}}, "Field required"),
        ({}, "at least 1"),
        ({"a b": {"weight": 1}}, "should match pattern"),
        ({"a": {"weight": 1}, "b": {"weight": 1e-6}}, "b has weight 1e-06, which is 1.0e-06 of all draws; the least"),
    ],
)
def test_a_blend_that_cannot_be_kept_to_is_refused(datasets: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        blend(**datasets)


def test_a_reader_of_your_own_may_be_blended_but_not_kept() -> None:
    own = {"format": "custom", "target": "my_data:chats", "weight": 1}
    tree: dict[str, Any] = {"train": {"format": "blend", "datasets": {"own": own}}}
    assert list(DataConfig.model_validate(tree).train_datasets) == ["own"]
    with pytest.raises(
        ValidationError, match=r"token_cache needs files: nobody knows .* data.train.datasets.own reads"
    ):
        DataConfig.model_validate({**tree, "token_cache": {"directory": "tokens"}})
