"""The learning rate as a function of the step, and what decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.optimization.learning_rate import learning_rate
from kdmesh_trainer.optimization.optimizer import set_learning_rate
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig

Array: TypeAlias = npt.NDArray[np.float64]


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


FALLING = ["cosine", "linear", {"name": "polynomial", "power": 3}]
ENDLESS = ["constant", {"name": "inverse_sqrt", "timescale": 5}]
FALL: dict[str, Callable[[Array], Array]] = {
    "linear": lambda way: 1 - way,
    "cosine": lambda way: (1 + np.cos(np.pi * way)) / 2,
    "1-sqrt": lambda way: 1 - way**0.5,
}


@settings(deadline=None)
@given(
    steps=st.integers(2, 300),
    warmup=st.integers(0, 298),
    schedule=st.sampled_from([*FALLING, *ENDLESS]),
    final=st.floats(0, 1),
)
def test_every_schedule_stays_between_zero_and_the_peak(
    steps: int, warmup: int, schedule: str | dict[str, object], final: float
) -> None:
    end = {"final_fraction": final} if schedule in FALLING else {}
    values = rates(steps, warmup_steps=min(warmup, steps - 1), schedule=schedule, **end)
    assert all(0 <= value <= 2.0 + 1e-12 for value in values)
    assert max(values) == pytest.approx(2.0)
    if schedule in FALLING and warmup < steps - 2:
        assert values[-1] == pytest.approx(2.0 * final)


@pytest.mark.parametrize("shape", FALL)
@pytest.mark.parametrize(
    ("steps", "warmup", "fraction", "decay"), [(40, 5, 0.2, 8), (40, 0, 0.33, 14), (10, 6, 0.4, 4)]
)
def test_wsd_is_at_the_peak_between_warm_up_and_the_decay_that_ends_in_the_last_step(
    shape: str, steps: int, warmup: int, fraction: float, decay: int
) -> None:
    found = rates(
        steps,
        warmup_steps=warmup,
        final_fraction=0.05,
        schedule={"name": "wsd", "decay_fraction": fraction, "shape": shape},
    )
    rise = np.linspace(0, 2.0, warmup + 2)[1:-1]
    fall = 0.1 + 1.9 * FALL[shape](np.linspace(0, 1, decay + 1)[1:])
    stable = np.full(steps - warmup - decay, 2.0)
    np.testing.assert_allclose(found, np.concatenate([rise, stable, fall]), rtol=1e-14, atol=1e-15)
    assert found[-1] == 2.0 * 0.05


def test_wsd_may_decay_over_so_many_steps_whatever_the_number_of_all() -> None:
    schedule = {"name": "wsd", "decay_steps": 4, "shape": "linear"}
    short, long = (rates(steps, warmup_steps=2, final_fraction=0.0, schedule=schedule) for steps in (10, 25))
    assert short[6:] == long[21:] == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert short[:6] == long[:6]
    assert long[2:21] == [2.0] * 19


def test_wsd_decays_by_one_minus_the_root_over_the_last_fifth_unless_told_otherwise() -> None:
    told = {"name": "wsd", "decay_fraction": 0.2, "shape": "1-sqrt"}
    assert rates(50, schedule="wsd") == rates(50, schedule=told)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_is_a_power_of_the_way_that_is_left(power: float) -> None:
    found = rates(21, warmup_steps=4, final_fraction=0.25, schedule={"name": "polynomial", "power": power})
    left = np.linspace(1, 0, 17)
    np.testing.assert_allclose(found[4:], 0.5 + 1.5 * left**power, rtol=1e-14)


@pytest.mark.parametrize(("warmup", "timescale"), [(8, None), (8, 3), (0, 20)])
def test_inverse_sqrt_falls_with_the_root_of_the_steps_since_the_peak_however_many_there_are(
    warmup: int, timescale: int | None
) -> None:
    schedule = {"name": "inverse_sqrt", "timescale": timescale}
    found = rates(200, warmup_steps=warmup, schedule=schedule)
    scale = timescale or warmup
    since = np.arange(200 - warmup)
    np.testing.assert_allclose(found[warmup:], 2.0 / np.sqrt(1 + since / scale), rtol=1e-14)
    assert found[:50] == rates(50, warmup_steps=warmup, schedule=schedule)
    if timescale is None:  # as Vaswani et al. 2017 have it, whose warm-up ends where the two curves meet
        np.testing.assert_allclose(found[warmup:], 2.0 * np.sqrt(warmup / np.arange(warmup, 200)), rtol=1e-14)


@pytest.mark.parametrize(("fraction", "steps", "warmup"), [(0.03, 100, 3), (0.03, 101, 4), (0.1, 30, 3), (0.9, 1, 0)])
def test_warm_up_may_be_a_part_of_all_steps_rounded_up(fraction: float, steps: int, warmup: int) -> None:
    assert rates(steps, warmup_fraction=fraction) == rates(steps, warmup_steps=warmup)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, "give warmup_steps or warmup_fraction, and not both"),
        ({"schedule": "inverse_sqrt"}, "inverse_sqrt without warm-up needs its timescale"),
        ({"schedule": "constant", "final_fraction": 0.1}, "constant goes nowhere by the last step"),
        ({"schedule": {"name": "inverse_sqrt", "timescale": 9}, "final_fraction": 0}, "leave out final_fraction"),
        ({"schedule": "polynomial"}, "power"),
        ({"schedule": {"name": "wsd", "decay_steps": 9, "decay_fraction": 0.2}}, "decay_fraction or decay_steps, and"),
        ({"schedule": {"name": "cosine", "decay_fraction": 0.1}}, "decay_fraction"),
        ({"schedule": "warmup_stable_decay"}, "'wsd'"),
    ],
)
def test_what_says_too_little_or_has_no_effect_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        OptimizerConfig.model_validate(values)


def test_warm_up_and_decay_must_not_overlap() -> None:
    config = OptimizerConfig.model_validate({"warmup_steps": 6, "schedule": {"name": "wsd", "decay_fraction": 0.4}})
    assert config.too_short(10) is None
    assert config.too_short(9) == "optimizer: warm-up (6 steps) and decay (4) must be no more than steps (9)"


def test_norms_and_biases_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    # As of gpt_oss's experts.
    model.register_parameter("up_proj", torch.nn.Parameter(torch.zeros(2, 3, 3)))
    model.register_parameter("up_proj_bias", torch.nn.Parameter(torch.zeros(2, 3)))
    model.register_module("q_norm", torch.nn.LayerNorm((2, 3), bias=False))  # of two heads, as Cohere's
    optimizer = build_adamw(model, OptimizerConfig(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "up_proj": 0.1,
        "up_proj_bias": 0.0,
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "q_norm.weight": 0.0,
    }


def textbook_adamw(weight: Tensor, gradients: Tensor, config: OptimizerConfig, *, decay: float, rate: float) -> Tensor:
    """The weight after an update by each gradient, the n-th with `rate` / n."""
    weight, (beta1, beta2) = weight.detach().double(), config.betas
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for n, gradient in enumerate(gradients.double(), 1):
        first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
        direction = first / (1 - beta1**n) / ((second / (1 - beta2**n)).sqrt() + config.epsilon)
        weight = weight * (1 - rate / n * decay) - rate / n * direction
    return weight


def test_updates_are_the_textbooks_with_every_number_of_the_configuration() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(betas=(0.7, 0.6), epsilon=0.3, weight_decay=0.2)
    student, algorithm = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3, bias=False)
    both = torch.nn.ModuleList([student, algorithm])
    gradients = torch.randn(3, 3, 4)
    expected = [
        textbook_adamw(student.weight, gradients, config, decay=0.2, rate=0.1),
        textbook_adamw(algorithm.weight, gradients, config, decay=0.0, rate=0.5),
    ]
    optimizer = build_adamw(both, config, algorithm=algorithm, rate_factor=5.0)
    for n, gradient in enumerate(gradients, 1):
        set_learning_rate(optimizer, 0.1 / n)
        for weight in both.parameters():
            weight.grad = gradient.clone()
        optimizer.step()
    for weight, after in zip(both.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.double(), after, rtol=1e-5, atol=1e-6)
