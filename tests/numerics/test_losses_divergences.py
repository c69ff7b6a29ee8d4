"""What each divergence is by definition, on log-probabilities alone."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdmesh.losses import Divergence, forward_kl, jensen_shannon, reverse_kl

half = partial(jensen_shannon, beta=0.5)
ALL = [forward_kl, reverse_kl, half, partial(jensen_shannon, beta=0.1)]
pairs = st.tuples(st.integers(0, 2**16), st.integers(2, 60), st.sampled_from([1e-3, 0.1, 1.0, 8.0, 40.0]))


def draw(seed: int, vocabulary: int, spread: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two matrices of log-probabilities."""
    z_SCV = torch.randn(2, 8, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    log_q_CV, log_p_CV = z_SCV.to(dtype).log_softmax(-1)
    return log_q_CV, log_p_CV


def value(divergence: Divergence, log_q_CV: Tensor, log_p_CV: Tensor) -> Tensor:
    """[C]; the arguments are kept."""
    return divergence(log_q_CV.clone(), log_p_CV.clone())[0]


@pytest.mark.parametrize("divergence", ALL)
@given(pair=pairs)
def test_it_is_never_negative(divergence: Divergence, pair: tuple[int, int, float]) -> None:
    assert value(divergence, *draw(*pair)).min() >= -1e-12
    assert value(divergence, *draw(*pair, dtype=torch.float32)).min() >= -2e-6


@pytest.mark.parametrize("divergence", ALL)
@given(pair=pairs)
def test_it_is_zero_for_equals_and_only_for_them(divergence: Divergence, pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    assert value(divergence, log_p_CV, log_p_CV).abs().max() < 1e-12
    differs_C = (log_q_CV.exp() - log_p_CV.exp()).abs().amax(-1) > 1e-4
    assert (value(divergence, log_q_CV, log_p_CV)[differs_C] > 1e-12).all()


@given(pair=pairs)
def test_jensen_shannon_is_symmetric_and_bounded(pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    forth_C, back_C = value(half, log_q_CV, log_p_CV), value(half, log_p_CV, log_q_CV)
    torch.testing.assert_close(forth_C, back_C)
    assert forth_C.max() <= math.log(2) + 1e-12
    skewed_C = value(partial(jensen_shannon, beta=0.2), log_q_CV, log_p_CV)
    torch.testing.assert_close(skewed_C, value(partial(jensen_shannon, beta=0.8), log_p_CV, log_q_CV))


def test_jensen_shannon_of_disjoint_distributions_reaches_its_bound() -> None:
    log_q_CV = torch.tensor([[0.0, -400.0], [0.0, -80.0]]).log_softmax(-1)
    torch.testing.assert_close(value(half, log_q_CV, log_q_CV.flip(-1)), torch.full((2,), math.log(2)))


@given(pair=pairs)
def test_the_limits_of_jensen_shannon_are_the_two_kl_divergences(pair: tuple[int, int, float]) -> None:
    seed, vocabulary, spread = pair
    log_q_CV, log_p_CV = draw(seed, vocabulary, min(spread, 1.0))
    small = 1e-6
    near_forward_C = value(partial(jensen_shannon, beta=small), log_q_CV, log_p_CV) / small
    near_reverse_C = value(partial(jensen_shannon, beta=1 - small), log_q_CV, log_p_CV) / small
    torch.testing.assert_close(near_forward_C, value(forward_kl, log_q_CV, log_p_CV), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(near_reverse_C, value(reverse_kl, log_q_CV, log_p_CV), rtol=1e-3, atol=1e-7)


@given(pair=pairs)
def test_reverse_kl_is_forward_kl_the_other_way_round(pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    torch.testing.assert_close(value(reverse_kl, log_q_CV, log_p_CV), value(forward_kl, log_p_CV, log_q_CV))


@pytest.mark.parametrize("divergence", ALL)
def test_the_second_result_is_the_derivative_by_free_log_probabilities(divergence: Divergence) -> None:
    log_q_CV, log_p_CV = draw(3, 7, 1.0)
    _, h_CV = divergence(log_q_CV.clone(), log_p_CV.clone())
    step = 1e-6
    for token in range(7):
        moved_CV = torch.zeros_like(log_q_CV)
        moved_CV[:, token] = step
        up_C, down_C = (value(divergence, log_q_CV + sign * moved_CV, log_p_CV) for sign in (1, -1))
        torch.testing.assert_close(h_CV[:, token], (up_C - down_C) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("divergence", ALL)
def test_extreme_logits_give_finite_results(divergence: Divergence) -> None:
    z_CV = torch.tensor([[0.0, -3e4, 1e4], [88.0, -88.0, 0.0], [0.0, 0.0, -200.0]])
    values_C, h_CV = divergence(z_CV.log_softmax(-1), z_CV.flip(-1).log_softmax(-1))
    assert values_C.isfinite().all()
    assert h_CV.isfinite().all()
