"""The learning rate as a function of the step, and what decays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh_trainer.optimizer import build_adamw, learning_rate
from kdmesh_trainer.optimizer_config import OptimizerConfig


def rates(steps: int, **values: object) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": 2.0, **values})
    return [learning_rate(config, step=step, steps=steps) for step in range(steps)]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert rates(6, warmup_steps=3, schedule="constant") == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_linear_falls_to_the_final_fraction_in_the_last_step() -> None:
    assert rates(5, schedule="linear", final_fraction=0.2) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_cosine_is_half_way_in_the_middle() -> None:
    values = rates(5, schedule="cosine", final_fraction=0.0)
    assert values == pytest.approx([2.0, 2.0 * (0.5 + 0.5 * 0.5**0.5), 1.0, 2.0 * (0.5 - 0.5 * 0.5**0.5), 0.0])


@settings(deadline=None)
@given(
    steps=st.integers(2, 300),
    warmup=st.integers(0, 298),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    final=st.floats(0, 1),
)
def test_every_schedule_stays_between_zero_and_the_peak(steps: int, warmup: int, schedule: str, final: float) -> None:
    values = rates(steps, warmup_steps=min(warmup, steps - 1), schedule=schedule, final_fraction=final)
    assert all(0 <= value <= 2.0 + 1e-12 for value in values)
    assert max(values) == pytest.approx(2.0)
    if schedule != "constant" and warmup < steps - 2:
        assert values[-1] == pytest.approx(2.0 * final)


def test_norms_and_biases_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = build_adamw(model, OptimizerConfig(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }
