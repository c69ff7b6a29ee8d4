"""How many steps the epochs of a configuration make."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.errors import ConfigError
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.blend import Blended, Part
from kdmesh_trainer.run_length import num_steps
from kdmesh_trainer.sources.order import step_order


def config(*, sequences: int = 4, **keys: Any) -> TrainerConfig:
    tree = {
        "output": "run",
        "student": {"model": "student"},
        "objective": {"name": "sft"},
        "data": {"train": {"format": "chat", "path": "train.jsonl"}},
        "batch": {"sequences": sequences},
    }
    return TrainerConfig.model_validate(tree | keys)


def test_steps_are_those_that_are_given() -> None:
    assert num_steps(config(steps=7), 1000) == 7


@pytest.mark.parametrize(
    ("epochs", "items", "per_step", "steps"),
    [(1, 32, 4, 8), (1, 33, 4, 9), (3, 33, 4, 25), (0.5, 33, 4, 5), (0.1, 30, 1, 3), (2.2, 15, 11, 3), (1, 3, 32, 1)],
)
def test_epochs_are_rounded_up_to_whole_steps(epochs: float, items: int, per_step: int, steps: int) -> None:
    assert num_steps(config(epochs=epochs, sequences=per_step), items) == steps


@settings(deadline=None)
@given(epochs=st.integers(1, 3), items=st.integers(1, 40), per_step=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_sequence_comes_once_in_each_epoch_and_the_last_step_is_needed(
    epochs: int, items: int, per_step: int, seed: int
) -> None:
    steps = num_steps(config(epochs=epochs, sequences=per_step), items)
    order = step_order(range(items), per_step=per_step, seed=seed)
    came = Counter(index for step in range(steps) for index in order.of_step(step))
    assert len(came) == items
    assert min(came.values()) >= epochs
    assert (steps - 1) * per_step < epochs * items


def test_an_epoch_of_a_blend_has_as_many_draws_as_its_datasets_have_sequences() -> None:
    parts = [
        Part(name="large", weight=Fraction(1, 2), items=range(30)),
        Part(name="small", weight=Fraction(1, 2), items=range(10)),
    ]
    blended = Blended(parts)
    steps = num_steps(config(epochs=1), len(blended))
    order = step_order(blended, per_step=4, seed=0)
    drawn = sum((Counter(order.counts(step)) for step in range(steps)), Counter[str]())
    assert (steps, drawn) == (10, {"large": 20, "small": 20})


def test_an_epoch_of_an_on_policy_run_samples_from_each_prompt_once() -> None:
    keys: dict[str, Any] = {
        "objective": {"name": "distill"},
        "teacher": {"addresses": ["127.0.0.1:1"]},
        "data": {"train": {"format": "chat", "path": "train.jsonl"}, "max_tokens": 512},
    }
    source = {"kind": "on_policy", "samples_per_prompt": 4, "sampling": {"max_new_tokens": 64}}
    all_sampled = config(sequences=32, epochs=2, source=source, **keys)
    assert num_steps(all_sampled, 100) == 25
    half = config(sequences=32, epochs=2, source=source | {"sampled_fraction": 0.5}, **keys)
    assert num_steps(half, 100) == 50


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"optimizer": {"warmup_steps": 20}},
            r"epochs \(2\) of 40 sequences, 4 in a step: optimizer.warmup_steps \(20\) must be less than steps \(20\)",
        ),
        ({"profile": {"steps": [3, 20]}}, r"epochs \(2\) of 40 .*: profile.steps has 20; .* the last is 19"),
    ],
)
def test_epochs_that_make_too_few_steps_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert num_steps(config(epochs=2.1, **keys), 40) == 21
    with pytest.raises(ConfigError, match=words):
        num_steps(config(epochs=2, **keys), 40)


def test_epochs_that_make_more_steps_than_checkpoints_have_names_for_are_refused() -> None:
    assert num_steps(config(epochs=9_999_999.9), 40) == 99_999_999
    with pytest.raises(
        ConfigError, match=r"epochs \(1e\+07\) of 40 .*: steps \(100000000\) must be no more than 99999999"
    ):
        num_steps(config(epochs=10_000_000), 40)
