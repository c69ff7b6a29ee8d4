"""Draws tokens from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdmesh.types import Sampling


class Chance:
    """The random numbers of one sample: one for each token, from its seed alone."""

    def __init__(self, seed: int | None) -> None:
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def next(self) -> float:
        """Uniform in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """How one row's token is drawn."""

    sampling: Sampling
    chance: float  # uniform in [0, 1)
    seen_S: Tensor | None  # distinct ids that the sequence holds; needed where there is a repetition penalty


def draw(logits_BV: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-probability at temperature 1 under all of V, before any truncation or penalty.

    Args:
        logits_BV: float32, real tokens only.
        draws: one for each row; a row's token depends on its own row and draw alone.
    """
    tokens_B = _tokens(_penalised(logits_BV, draws), draws)
    chosen_B = logits_BV.gather(1, tokens_B[:, None])[:, 0]
    logprobs_B = chosen_B - logits_BV.logsumexp(1)
    # A difference of roundings: a sure token may come out a hair above 0.
    return tokens_B.tolist(), logprobs_B.clamp(max=0.0).tolist()


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
    sorted_BV, order_BV = probs_BV.sort(dim=1, descending=True, stable=True)
    sorted_BV = sorted_BV.double()

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=probs_BV.device)[:, None]

    size = probs_BV.shape[1]
    top_k = column([one.sampling.top_k or size for one in draws])
    sorted_BV *= torch.arange(size, device=probs_BV.device) < top_k
    # top_p is of what top_k has left: a token stays when those before it have not reached top_p.
    sums_BV = sorted_BV.cumsum(1)
    before_BV = (sums_BV - sorted_BV) / sums_BV[:, -1:]
    sorted_BV *= before_BV < column([one.sampling.top_p if one.sampling.top_p < 1 else math.inf for one in draws])
    sorted_BV *= sorted_BV >= column([one.sampling.min_p for one in draws]) * sorted_BV[:, :1]
    places_B = _invert(sorted_BV.cumsum(1), draws)
    return order_BV.gather(1, places_B[:, None])[:, 0]


def _invert(sums_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[B] the index whose share of the running sums each row's chance falls into; never one without a share."""
    total_B1 = sums_BV[:, -1:].contiguous()
    chance_B1 = torch.tensor([[one.chance] for one in draws], dtype=torch.float64, device=sums_BV.device)
    below_B1 = torch.minimum(chance_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(sums_BV, below_B1, right=True)[:, 0]
