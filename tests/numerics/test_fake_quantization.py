"""What a matrix and an activation are rounded to, against numbers that are counted out in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from kdmesh_trainer.student.fake_quantization import QuantizedLinear, Rounding

FORMATS: list[dict[str, Any]] = [
    {"weights": "int4", "group_size": 32},
    {"weights": "int4", "group_size": 128},
    {"weights": "int4"},
    {"weights": "int8", "group_size": 64},
    {"weights": "int8"},
    {"weights": "fp8"},
]
WITH_ACTIVATIONS: list[dict[str, Any]] = [
    {"weights": "int8", "activations": "int8"},
    {"weights": "fp8", "activations": "fp8"},
]


def numbers(name: str) -> Tensor:
    """All that there are, in float64 and in order."""
    if name != "fp8":
        bits = int(name.removeprefix("int"))
        return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    # E4M3: 1.mmm * 2^(e - 7), or 0.mmm * 2^-6 where e is 0; the last of all is no number.
    positive = [
        (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6
        for e, m in itertools.product(range(16), range(8))
        if (e, m) != (15, 7)
    ]
    return torch.tensor(sorted({*positive, *(-value for value in positive)}), dtype=torch.float64)


def nearest(shares: Tensor, name: str) -> Tensor:
    """Of those numbers, for each share, in float64; the even one of two that are as near."""
    known = numbers(name)
    above = torch.bucketize(shares, known).clamp(1, len(known) - 1)
    below, beyond = shares - known[above - 1], known[above] - shares
    is_even = above % 2 == 0  # as the first of all is, and 0
    return torch.where((beyond < below) | ((beyond == below) & is_even), known[above], known[above - 1])


def oracle(matrix: Tensor, name: str, group_size: int | None) -> Tensor:
    """Every number as a multiple of its scale, which is a bfloat16, in float64."""
    groups = matrix.double().reshape(len(matrix), -1, group_size or matrix.shape[1])
    known = numbers(name)
    middle = (known.max() - known.min()) / 2
    scales = (groups.abs().amax(-1, keepdim=True) / middle).bfloat16().double()
    shares = torch.where(scales > 0, groups / scales, 0.0)
    return (nearest(shares, name) * scales).reshape(matrix.shape)


def rounding(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Rounding:
    return Rounding.of(QuantizationConfig(**settings), dtype)


@pytest.mark.parametrize("settings", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_the_nearest_multiple_of_its_scale(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, 256) * torch.logspace(-20, 20, 40)[:, None]
    matrix[3, 128:] = 0
    matrix[4] = 0
    matrix[5, :32] *= 1e6
    found = rounding(settings, dtype).rounded(matrix)
    expected = oracle(matrix.to(dtype), settings["weights"], settings.get("group_size"))
    assert found.dtype == dtype
    exactly = 0.0 if dtype == torch.float32 else 2.0**-8
    # Where two are as near, as in bfloat16 they often are, either will do.
    error, least = ((value.double() - matrix.to(dtype).double()).abs() for value in (found, expected))
    assert (error <= least * (1 + 1e-12) + exactly * expected.abs()).all()
    if dtype == torch.float32:
        assert (found.double() != expected).float().mean() < 1e-3
    assert not found[4].any() and not found[3, 128:].any()


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_no_number_is_off_by_more_than_half_a_step_and_what_its_scale_is_rounded_by(name: str) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(64, 128)
    rounded = rounding({"weights": name}).rounded(matrix)
    known = numbers(name)
    scales = matrix.abs().amax(1, keepdim=True) / ((known.max() - known.min()) / 2)
    widest = known.diff().max() if name == "fp8" else 1.0
    assert ((rounded - matrix).abs() <= scales * (widest / 2 + known.max() * 2.0**-8)).all()


@pytest.mark.parametrize("settings", [*FORMATS, *WITH_ACTIVATIONS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_textbook_formula(
    settings: dict[str, Any], dtype: torch.dtype, has_bias: bool
) -> None:
    """y = (x + stop(round(x) - x)) (W + stop(round(W) - W))^T + b, by autograd."""
    torch.manual_seed(2)
    plain = nn.Linear(256, 24, bias=has_bias).to(dtype)
    how = rounding(settings, dtype)
    module = QuantizedLinear(plain, how)
    inputs = [torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(3)).to(dtype) for _ in range(2)]
    found = module(inputs[0].requires_grad_())
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    found.backward(probe)
    gradients = [parameter.grad.clone() for parameter in plain.parameters() if parameter.grad is not None]
    plain.zero_grad()

    through = inputs[1].requires_grad_()
    given = through + (how.rounded_input(through) - through).detach()
    # In bfloat16 the sum would be rounded once more: the same value, and the gradient of W.
    weight = plain.weight + (how.rounded(plain.weight) - plain.weight).detach()
    weight = weight + (how.rounded(plain.weight) - weight).detach()
    given = given + (how.rounded_input(through) - given).detach()
    expected = nn.functional.linear(given, weight, plain.bias)
    expected.backward(probe)
    assert torch.equal(found, expected)
    assert torch.allclose(inputs[0].grad.float(), inputs[1].grad.float(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    assert len(gradients) == 1 + has_bias
    for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
        assert parameter.grad is not None
        exactly = 1e-5 if dtype == torch.float32 else 2.0**-7
        assert torch.allclose(gradient.float(), parameter.grad.float(), rtol=exactly, atol=exactly)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_token_has_a_scale_of_its_own(name: str) -> None:
    torch.manual_seed(5)
    tokens = torch.randn(7, 64) * torch.logspace(-6, 6, 7)[:, None]
    tokens[2] = 0
    found = rounding({"weights": name, "activations": name}).rounded_input(tokens)
    scales = tokens.abs().amax(1, keepdim=True).double() / numbers(name).max()
    expected = nearest(torch.where(scales > 0, tokens.double() / scales, 0.0), name) * scales
    off = (found.double() - expected).abs() > 1e-6 * expected.abs()
    assert off.float().mean() < 0.01  # where two numbers are as near
    assert not found[2].any()
    assert torch.equal(rounding({"weights": name}).rounded_input(tokens), tokens)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_what_an_input_is_rounded_to_does_not_hang_on_its_last_bit(name: str) -> None:
    torch.manual_seed(6)
    tokens = torch.randn(4000, 64, dtype=torch.float64)
    nearly = tokens * (1 + 1e-14 * torch.randn_like(tokens))  # as another order of a sum leaves it
    one, other = (rounding({"weights": name, "activations": name}).rounded_input(value) for value in (tokens, nearly))
    assert torch.allclose(one, other, rtol=1e-12, atol=0)


def test_numbers_in_the_middle_go_to_the_even_one() -> None:
    matrix = torch.tensor([[7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -7.5, 6.5]])  # of scale 1
    assert rounding({"weights": "int4"}).rounded(matrix).tolist() == [[7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -8.0, 6.0]]
