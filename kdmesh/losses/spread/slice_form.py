"""Which divergences follow from what each rank makes of its own tokens, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdmesh.losses import divergences, selective
from kdmesh.losses.divergences import Divergence
from kdmesh.losses.sampled import SampledDivergence, sampled_reverse_kl

# (values_WB, agrees_B) -> (value_B, factors_WB): each slice's value of every row, by rank, and 1 where both models
# prefer one token, else 0. The result is the value over all tokens, and what each slice's h is to be multiplied by.
Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceForm:
    """A divergence over all tokens from those over slices, whose log-probabilities are normalised over all tokens."""

    compare: Divergence | SampledDivergence  # of one slice
    combine: Combine


def slice_form(divergence: Divergence | SampledDivergence) -> SliceForm | None:
    """The form of a divergence, from `build_divergence` or the function itself; None where a slice is not enough.

    That is where a row is looked at as a whole: in an order, through a threshold, or in a way that is the user's own.
    """
    function: Any = divergence.function if isinstance(divergence, SampledDivergence) else divergence
    params = function.keywords if isinstance(function, partial) else {}
    function = function.func if isinstance(function, partial) else function
    if function in _SUMS:
        return SliceForm(compare=divergence, combine=_added)
    if function is divergences.renyi:
        return SliceForm(compare=divergence, combine=partial(_log_added, order=params["order"]))
    if function is selective.masked_reverse_kl:
        return SliceForm(compare=divergences.reverse_kl, combine=_added_where_they_disagree)
    return None


# Sums over tokens of a function of log q and log p; the estimate has one such term, that of the drawn token.
_SUMS = {
    divergences.forward_kl,
    divergences.reverse_kl,
    divergences.jensen_shannon,
    divergences.skewed_kl,
    divergences.skewed_reverse_kl,
    divergences.total_variation,
    divergences.alpha_beta,
    sampled_reverse_kl,
}


def _added(values_WB: Tensor, agrees_B: Tensor) -> tuple[Tensor, Tensor]:
    return values_WB.sum(0), torch.ones_like(values_WB)


def _added_where_they_disagree(values_WB: Tensor, agrees_B: Tensor) -> tuple[Tensor, Tensor]:
    differs_B = 1 - agrees_B
    return values_WB.sum(0) * differs_B, differs_B.expand_as(values_WB)


def _log_added(values_WB: Tensor, agrees_B: Tensor, *, order: float) -> tuple[Tensor, Tensor]:
    """Renyi's: a logarithm of a sum, and h is normalised by that sum."""
    logs_WB = values_WB * (order - 1)
    log_sum_B = logs_WB.logsumexp(0)
    return log_sum_B / (order - 1), (logs_WB - log_sum_B).exp()
