"""Divergences that are estimated from the one token which the student drew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampledDivergence:
    """As a `Divergence`, with a third argument: the token [C, 1] int64 that was drawn from q on each row.

    Its value is an estimate, so it may be negative, and h need not be the derivative of the value.
    """

    function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sampled_reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, token_C1: Tensor) -> tuple[Tensor, Tensor]:
    """log q - log p at the drawn token, an estimate of KL(q || p), and that times the gradient of log q there.

    The policy gradient with the log-ratio as its cost: averaged over tokens drawn from q, it is the gradient of
    reverse KL, which `reverse_kl` takes over the whole vocabulary, without noise.

    Source: Lu and Thinking Machines Lab 2025, "On-Policy Distillation"; Williams 1992 (REINFORCE),
    doi:10.1007/BF00992696.
    """
    cost_C1 = log_q_CV.gather(-1, token_C1) - log_p_CV.gather(-1, token_C1)
    return cost_C1[:, 0], torch.zeros_like(log_q_CV).scatter_(-1, token_C1, cost_C1)
