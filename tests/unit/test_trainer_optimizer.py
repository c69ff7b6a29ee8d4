"""The learning rate as a function of the step, and what decays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdmesh_trainer.optimizer import build_adamw, learning_rate, set_learning_rate
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
