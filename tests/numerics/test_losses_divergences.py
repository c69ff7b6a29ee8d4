"""What each divergence is by definition, on log-probabilities alone."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdmesh.losses import Divergence, forward_kl, jensen_shannon, reverse_kl, truncated
from kdmesh.losses.divergences import alpha_beta, renyi, skewed_kl, skewed_reverse_kl, total_variation
from kdmesh.losses.least_likely import least_likely
from kdmesh.losses.sampled import sampled_reverse_kl
from kdmesh.losses.selective import (
    adaptive_kl,
    entropy_gated_kl,
    hierarchical_ranking,
    masked_reverse_kl,
    top1_cross_entropy,
)

half = partial(jensen_shannon, beta=0.5)
ALL = [
    forward_kl,
    reverse_kl,
    half,
    partial(jensen_shannon, beta=0.1),
    partial(skewed_kl, skew=0.1),
    partial(skewed_reverse_kl, skew=0.1),
    total_variation,
    partial(renyi, order=0.5),
    partial(renyi, order=2.0),
    partial(alpha_beta, alpha=0.2, beta=0.7),
    partial(adaptive_kl, tail_mass=0.5),
    partial(entropy_gated_kl, threshold=1.0, forward_weight=0.5),
]
# Not 0 for equals alone, or not only for them.
OTHERS = [masked_reverse_kl, top1_cross_entropy, partial(hierarchical_ranking, top_k=3)]
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
@settings(max_examples=25)
@given(pair=pairs)
def test_it_is_never_negative(divergence: Divergence, pair: tuple[int, int, float]) -> None:
    assert value(divergence, *draw(*pair)).min() >= -1e-12
    assert value(divergence, *draw(*pair, dtype=torch.float32)).min() >= -2e-6


@pytest.mark.parametrize("divergence", ALL)
@settings(max_examples=25)
@given(pair=pairs)
def test_it_is_zero_for_equals_and_only_for_them(divergence: Divergence, pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    assert value(divergence, log_p_CV, log_p_CV).abs().max() < 1e-12
    differs_C = (log_q_CV.exp() - log_p_CV.exp()).abs().amax(-1) > 1e-4
    assert (value(divergence, log_q_CV, log_p_CV)[differs_C] > 1e-12).all()


@settings(max_examples=25)
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


@settings(max_examples=25)
@given(pair=pairs)
def test_the_limits_of_jensen_shannon_are_the_two_kl_divergences(pair: tuple[int, int, float]) -> None:
    seed, vocabulary, spread = pair
    log_q_CV, log_p_CV = draw(seed, vocabulary, min(spread, 1.0))
    small = 1e-6
    near_forward_C = value(partial(jensen_shannon, beta=small), log_q_CV, log_p_CV) / small
    near_reverse_C = value(partial(jensen_shannon, beta=1 - small), log_q_CV, log_p_CV) / small
    torch.testing.assert_close(near_forward_C, value(forward_kl, log_q_CV, log_p_CV), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(near_reverse_C, value(reverse_kl, log_q_CV, log_p_CV), rtol=1e-3, atol=1e-7)


@settings(max_examples=25)
@given(pair=pairs)
def test_reverse_kl_is_forward_kl_the_other_way_round(pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    torch.testing.assert_close(value(reverse_kl, log_q_CV, log_p_CV), value(forward_kl, log_p_CV, log_q_CV))


@pytest.mark.parametrize("divergence", [*(one for one in ALL if getattr(one, "func", one) is not adaptive_kl), *OTHERS])
def test_the_second_result_is_the_derivative_by_free_log_probabilities(divergence: Divergence) -> None:
    log_q_CV, log_p_CV = draw(3, 7, 1.0)
    _, h_CV = divergence(log_q_CV.clone(), log_p_CV.clone())
    step = 1e-6
    for token in range(7):
        moved_CV = torch.zeros_like(log_q_CV)
        moved_CV[:, token] = step
        up_C, down_C = (value(divergence, log_q_CV + sign * moved_CV, log_p_CV) for sign in (1, -1))
        torch.testing.assert_close(h_CV[:, token], (up_C - down_C) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("divergence", [*ALL, *OTHERS, *(truncated(one, top_p=0.9) for one in ALL)])
def test_extreme_logits_give_finite_results(divergence: Divergence) -> None:
    z_CV = torch.tensor([[0.0, -3e4, 1e4], [88.0, -88.0, 0.0], [0.0, 0.0, -200.0]])
    values_C, h_CV = divergence(z_CV.log_softmax(-1), z_CV.flip(-1).log_softmax(-1))
    assert values_C.isfinite().all()
    assert h_CV.isfinite().all()


@settings(max_examples=25)
@given(pair=pairs)
def test_total_variation_is_symmetric_and_at_most_one(pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    forth_C = value(total_variation, log_q_CV, log_p_CV)
    torch.testing.assert_close(forth_C, value(total_variation, log_p_CV, log_q_CV))
    assert forth_C.max() <= 1 + 1e-12
    apart_CV = torch.tensor([[0.0, -800.0]], dtype=torch.float64).log_softmax(-1)
    assert value(total_variation, apart_CV, apart_CV.flip(-1)).item() == 1


@settings(max_examples=25)
@given(pair=pairs)
def test_skewed_divergences_have_their_bounds_and_the_kl_divergences_as_limits(pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    for skewed in (skewed_kl, skewed_reverse_kl):
        assert value(partial(skewed, skew=0.3), log_q_CV, log_p_CV).max() <= -math.log(0.3) + 1e-12
    seed, vocabulary, spread = pair
    log_q_CV, log_p_CV = draw(seed, vocabulary, min(spread, 1.0))
    for skewed, limit in ((skewed_kl, forward_kl), (skewed_reverse_kl, reverse_kl)):
        near_C = value(partial(skewed, skew=1e-7), log_q_CV, log_p_CV)
        torch.testing.assert_close(near_C, value(limit, log_q_CV, log_p_CV), rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(pair=pairs)
def test_renyi_grows_with_its_order_and_is_forward_kl_near_one(pair: tuple[int, int, float]) -> None:
    seed, vocabulary, spread = pair
    log_q_CV, log_p_CV = draw(seed, vocabulary, min(spread, 1.0))
    orders = [0.2, 0.9, 1.1, 3.0]
    values_OC = torch.stack([value(partial(renyi, order=order), log_q_CV, log_p_CV) for order in orders])
    assert (values_OC.diff(dim=0) >= -1e-12).all()
    near_C = value(partial(renyi, order=1 + 1e-6), log_q_CV, log_p_CV)
    torch.testing.assert_close(near_C, value(forward_kl, log_q_CV, log_p_CV), rtol=1e-3, atol=1e-7)


@settings(max_examples=25)
@given(pair=pairs)
def test_alpha_beta_has_both_kl_divergences_as_limits_and_swaps_with_its_arguments(
    pair: tuple[int, int, float],
) -> None:
    seed, vocabulary, spread = pair
    log_q_CV, log_p_CV = draw(seed, vocabulary, min(spread, 1.0))
    for alpha, beta, limit in ((1.0, 1e-6, forward_kl), (1e-6, 1.0, reverse_kl)):
        near_C = value(partial(alpha_beta, alpha=alpha, beta=beta), log_q_CV, log_p_CV)
        torch.testing.assert_close(near_C, value(limit, log_q_CV, log_p_CV), rtol=1e-3, atol=1e-6)
    forth_C = value(partial(alpha_beta, alpha=0.3, beta=0.8), log_q_CV, log_p_CV)
    torch.testing.assert_close(forth_C, value(partial(alpha_beta, alpha=0.8, beta=0.3), log_p_CV, log_q_CV))


@settings(max_examples=25)
@given(pair=pairs)
def test_adaptive_kl_lies_between_the_two_kl_divergences(pair: tuple[int, int, float]) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    both_2C = torch.stack([value(forward_kl, log_q_CV, log_p_CV), value(reverse_kl, log_q_CV, log_p_CV)])
    adaptive_C = value(partial(adaptive_kl, tail_mass=0.5), log_q_CV, log_p_CV)
    assert (adaptive_C >= both_2C.amin(0) * (1 - 1e-12) - 1e-12).all()
    assert (adaptive_C <= both_2C.amax(0) * (1 + 1e-12) + 1e-12).all()


def test_the_gradient_of_adaptive_kl_is_finite_and_that_of_a_half_of_each_where_both_are_equal() -> None:
    log_p_CV, _ = draw(1, 9, 2.0)
    _, h_CV = adaptive_kl(log_p_CV.clone(), log_p_CV.clone(), tail_mass=0.5)
    torch.testing.assert_close(h_CV, (forward_kl(log_p_CV.clone(), log_p_CV.clone())[1] + log_p_CV.exp()) / 2)


@settings(max_examples=40)
@given(pair=pairs, mass=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_least_likely_tokens_are_the_most_that_fit(
    pair: tuple[int, int, float], mass: float, dtype: torch.dtype
) -> None:
    p_CV = draw(*pair, dtype=dtype)[0].exp()
    is_least_CV = least_likely(p_CV, mass)
    for p_V, is_least_V in zip(p_CV, is_least_CV, strict=True):
        within, without = p_V[is_least_V], p_V[~is_least_V]
        assert within.sum() <= mass + 1e-6
        if len(without):
            assert not len(within) or within.max() < without.min()
            assert (within.sum() + without[without == without.min()].sum()).item() > mass - 1e-6


def test_tokens_of_one_probability_are_all_or_none_of_the_least_likely() -> None:
    p_CV = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.3]])
    assert least_likely(p_CV, 0.55).tolist() == [[True, False, False, False, False]]
    assert least_likely(p_CV, 0.75).tolist() == [[True, True, True, True, False]]
    assert least_likely(p_CV, 0.05).tolist() == [[False] * 5]


@settings(max_examples=25)
@given(pair=pairs)
def test_masked_reverse_kl_and_ranking_have_nothing_to_say_to_a_student_in_the_teachers_order(
    pair: tuple[int, int, float],
) -> None:
    log_q_CV, log_p_CV = draw(*pair)
    sharper_CV = (2 * log_p_CV).log_softmax(-1)
    for divergence in (masked_reverse_kl, partial(hierarchical_ranking, top_k=4)):
        found_C, h_CV = divergence(sharper_CV.clone(), log_p_CV.clone())
        assert found_C.abs().max() == 0
        assert h_CV.abs().max() == 0
    differs_C = log_q_CV.argmax(-1) != log_p_CV.argmax(-1)
    torch.testing.assert_close(
        value(masked_reverse_kl, log_q_CV, log_p_CV), value(reverse_kl, log_q_CV, log_p_CV) * differs_C
    )


@pytest.mark.parametrize("divergence", ALL + OTHERS)
def test_a_truncation_that_keeps_every_token_changes_nothing(divergence: Divergence) -> None:
    log_q_CV, log_p_CV = draw(5, 12, 2.0)
    plain_C, plain_CV = divergence(log_q_CV.clone(), log_p_CV.clone())
    kept_C, kept_CV = truncated(divergence, top_k=12)(log_q_CV.clone(), log_p_CV.clone())
    torch.testing.assert_close(kept_C, plain_C, rtol=0, atol=1e-14)
    torch.testing.assert_close(kept_CV, plain_CV, rtol=0, atol=1e-14)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, half, partial(renyi, order=0.5)])
def test_a_truncation_loses_information_and_never_adds_any(divergence: Divergence) -> None:
    log_q_CV, log_p_CV = draw(6, 30, 2.0)
    values_KC = [value(truncated(divergence, top_k=k), log_q_CV, log_p_CV) for k in (1, 4, 16, 30)]
    for fewer_C, more_C in itertools.pairwise(values_KC):
        assert (fewer_C <= more_C + 1e-12).all()
    assert (values_KC[0] < values_KC[-1]).all()


def test_sampled_reverse_kl_is_reverse_kl_and_its_gradient_when_averaged_over_what_is_drawn() -> None:
    log_q_CV, log_p_CV = draw(7, 11, 1.5)
    q_CV = log_q_CV.exp()
    mean_C, mean_CV = torch.zeros(len(q_CV), dtype=torch.float64), torch.zeros_like(q_CV)
    for token in range(11):
        token_C1 = torch.full((len(q_CV), 1), token)
        value_C, h_CV = sampled_reverse_kl(log_q_CV.clone(), log_p_CV.clone(), token_C1)
        mean_C += q_CV[:, token] * value_C
        mean_CV += q_CV[:, token, None] * (h_CV - q_CV * h_CV.sum(-1, keepdim=True))
    exact_C, exact_CV = reverse_kl(log_q_CV.clone(), log_p_CV.clone())
    torch.testing.assert_close(mean_C, exact_C)
    torch.testing.assert_close(mean_CV, exact_CV - q_CV * exact_CV.sum(-1, keepdim=True))
