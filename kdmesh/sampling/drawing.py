"""Draws tokens from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.types import Sampling

_LIKELIEST = 1024  # tokens that truncation seldom leaves more of; sorting a whole vocabulary takes longer than a step


class Chance:
    """The random numbers of one sample: one for each token, from its seed alone."""

    def __init__(self, seed: int | None) -> None:
        # Not torch's generator, which knows only 32 bits of a seed, nor a device's, where it means something else.
        self._generator = np.random.default_rng(seed)

    def next(self) -> float:
        """Uniform in [0, 1)."""
        return self._generator.random()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """How one row's token is drawn."""

    sampling: Sampling
    chance: float  # uniform in [0, 1)
    seen_S: Tensor | None  # distinct ids that the sequence holds; needed where there is a repetition penalty


def draw(logits_BV: Tensor, draws: Sequence[Draw], *, never: int | None = None) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-probability at temperature 1 under all of V, before any truncation or penalty.

    Args:
        logits_BV: float32, real tokens only.
        draws: one for each row; a row's token depends on its own row and draw alone.
        never: a token that is not drawn, whatever its probability; None: there is none.

    Raises:
        EngineFailure: a row is not finite.
    """
    wanted_BV = _penalised(logits_BV, draws)
    if never is not None:
        wanted_BV = wanted_BV.index_fill(1, torch.tensor([never], device=wanted_BV.device), -math.inf)
    tokens_B = _tokens(wanted_BV, draws)
    chosen_B = logits_BV.gather(1, tokens_B[:, None])[:, 0]
    logprobs_B = chosen_B - logits_BV.logsumexp(1)
    # A difference of roundings: a sure token may come out a hair above 0.
    tokens, logprobs = tokens_B.tolist(), logprobs_B.clamp(max=0.0).tolist()
    # Of a row that is not finite no log-probability is. Looked at here, since only here a device is waited for anyway.
    if not all(map(math.isfinite, logprobs)):
        raise EngineFailure("the model's logits are not finite, so no token is drawn; look at its weights")
    return tokens, logprobs


def _penalised(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    penalised = [row for row, one in enumerate(draws) if one.sampling.repetition_penalty != 1]
    if not penalised:
        return logits_BV
    logits_BV = logits_BV.clone()
    for row in penalised:
        seen_S, penalty = draws[row].seen_S, draws[row].sampling.repetition_penalty
        assert seen_S is not None
        logits_S = logits_BV[row, seen_S]
        logits_BV[row, seen_S] = torch.where(logits_S > 0, logits_S / penalty, logits_S * penalty)
    return logits_BV


def _tokens(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[B] tokens. A row's way depends on its own sampling, so that its neighbours cannot change its token."""
    tokens_B = torch.empty(len(draws), dtype=torch.int64, device=logits_BV.device)
    greedy = [row for row, one in enumerate(draws) if one.sampling.temperature == 0]
    cut = [row for row, one in enumerate(draws) if one.sampling.temperature > 0 and _is_cut(one.sampling)]
    plain = [row for row, one in enumerate(draws) if one.sampling.temperature > 0 and not _is_cut(one.sampling)]
    if greedy:
        tokens_B[greedy] = logits_BV[greedy].argmax(1)
    for rows, pick in ((plain, _draw_plain), (cut, _draw_cut)):
        if rows:
            chosen = [draws[row] for row in rows]
            temperatures = torch.tensor([one.sampling.temperature for one in chosen], device=logits_BV.device)
            # Below 0 before the division, so that no temperature is too small for it.
            below_BV = logits_BV[rows] - logits_BV[rows].amax(1, keepdim=True)
            tokens_B[rows] = pick((below_BV / temperatures[:, None]).softmax(1), chosen)
    return tokens_B


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def _draw_plain(probs_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    return _invert(probs_BV.cumsum(1, dtype=torch.float64), draws)


def _draw_cut(probs_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """From a row's likeliest tokens, which are found fast; from all of them, sorted, where truncation leaves more."""
    size = min(_LIKELIEST, probs_BV.shape[1])
    likeliest_BK, order_BK = probs_BV.topk(size, dim=1)
    total_B1 = probs_BV.sum(1, keepdim=True, dtype=torch.float64)
    tokens_B, is_enough = _draw_sorted(likeliest_BK, order_BK, total_B1, draws)
    rest = [row for row, enough in enumerate(is_enough) if not enough]
    if rest:
        sorted_BV, order_BV = probs_BV[rest].sort(dim=1, descending=True, stable=True)
        tokens_B[rest], _ = _draw_sorted(sorted_BV, order_BV, total_B1[rest], [draws[row] for row in rest])
    return tokens_B


def _draw_sorted(
    probs_BK: Tensor, order_BK: Tensor, total_B1: Tensor, draws: Sequence[Draw]
) -> tuple[Tensor, list[bool]]:
    """[B] tokens, and for each row whether truncation leaves none but the K given.

    Args:
        probs_BK: the likeliest tokens' probabilities, falling.
        order_BK: which tokens they are.
        total_B1: float64, sum over all tokens.
        draws: one for each row.
    """
    probs_BK = probs_BK.double()
    size = probs_BK.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=probs_BK.device)[:, None]

    top_k = column([one.sampling.top_k or math.inf for one in draws])
    top_p = column([one.sampling.top_p if one.sampling.top_p < 1 else math.inf for one in draws])
    least_B1 = column([one.sampling.min_p for one in draws]) * probs_BK[:, :1]
    left_BK = probs_BK * (torch.arange(size, device=probs_BK.device) < top_k)
    sums_BK = left_BK.cumsum(1)
    # top_p is of what top_k has left: a token stays when those before it have not reached top_p.
    reached_BK = sums_BK / torch.where(top_k <= size, sums_BK[:, -1:], total_B1)
    is_enough_B1 = (top_k <= size) | ((reached_BK[:, -1:] >= top_p) | (probs_BK[:, -1:] < least_B1)) & top_k.isinf()
    before_BK = reached_BK.roll(1, 1)
    before_BK[:, 0] = 0
    left_BK *= (before_BK < top_p) & (left_BK >= least_B1)
    places_B = _invert(left_BK.cumsum(1), draws)
    return order_BK.gather(1, places_B[:, None])[:, 0], is_enough_B1[:, 0].tolist()


def _invert(sums_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[B] the index whose share of the running sums each row's chance falls into; never one without a share.

    Sums that are no numbers have some index, too: a GPU is not to fail for it.
    """
    total_B1 = sums_BV[:, -1:].contiguous()
    chance_B1 = torch.tensor([[one.chance] for one in draws], dtype=torch.float64, device=sums_BV.device)
    below_B1 = torch.minimum(chance_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(sums_BV, below_B1, right=True)[:, 0].clamp(max=sums_BV.shape[1] - 1)
