"""Rows as float8 are as near to what they were as kdmesh/handles/fp8.py says, and no nearer than they can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.handles import fp8
from kdmesh.types import DType

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def there_and_back(rows_RD: Tensor) -> Tensor:
    data = rows_RD.contiguous().view(torch.uint8).numpy().reshape(-1).data.toreadonly()
    encoded = fp8.encode(data, cols=rows_RD.shape[1], dtype=DType(str(rows_RD.dtype).removeprefix("torch.")))
    assert len(encoded) == rows_RD.shape[0] * (rows_RD.shape[1] + 4)
    back_RD = torch.empty_like(rows_RD)
    assert fp8.decode(memoryview(encoded), back_RD) == len(rows_RD)
    return back_RD


@given(st.integers(0, 2**20), st.sampled_from(list(ROUNDING)), st.integers(1, 90), st.floats(-4, 4))
def test_every_element_is_within_the_stated_error(seed: int, dtype: torch.dtype, cols: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows_RD = torch.randn(7, cols, generator=generator) * 10.0**exponent
    rows_RD *= torch.randn(7, cols, generator=generator).exp() ** 2  # outliers
    rows_RD = rows_RD.to(dtype)
    x_RD, back_RD = rows_RD.double(), there_and_back(rows_RD).double()
    if not x_RD.isfinite().all():
        return
    bound_RD = x_RD.abs() / 16 + x_RD.abs().amax(dim=1, keepdim=True) / 450_000
    bound_RD += ROUNDING[dtype] * back_RD.abs() + (6e-8 if dtype is torch.float16 else 0)
    assert ((back_RD - x_RD).abs() <= bound_RD * (1 + 1e-6)).all()


def test_the_stated_error_is_hardly_larger_than_the_real_one() -> None:
    rows_RD = torch.linspace(0.02, 1, 100_000).view(1, -1)
    error_RD = ((there_and_back(rows_RD) - rows_RD) / rows_RD).abs()
    assert 0.055 < float(error_RD.max()) <= 1 / 16


def test_rows_have_scales_of_their_own() -> None:
    rows_RD = torch.tensor([[1.0, -2.0], [1e-20, 2e-20], [0.0, 0.0], [3e30, 1.5e30]])
    assert torch.allclose(there_and_back(rows_RD), rows_RD, rtol=1e-6, atol=0)


def test_the_largest_magnitude_of_a_row_stays_as_it_is() -> None:
    rows_RD = torch.randn(50, 33).to(torch.bfloat16)
    at = rows_RD.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(there_and_back(rows_RD).gather(1, at), rows_RD.gather(1, at))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_never_becomes_finite(bad: float) -> None:
    rows_RD = torch.ones(3, 4)
    rows_RD[1, 2] = bad
    back_RD = there_and_back(rows_RD)
    assert back_RD[1].isnan().all() and torch.equal(back_RD[[0, 2]], rows_RD[[0, 2]])


@pytest.mark.parametrize("num_bytes", [0, 7, 9, 16, 40])
def test_what_is_not_whole_rows_is_refused(num_bytes: int) -> None:
    with pytest.raises(EngineFailure, match="holds no whole rows of 4"):
        fp8.decode(memoryview(bytes(num_bytes)), torch.empty(1, 4))


def test_a_chunk_holds_at_least_one_row() -> None:
    assert (fp8.rows_of(100, 21), fp8.rows_of(100, 1000)) == (4, 1)
