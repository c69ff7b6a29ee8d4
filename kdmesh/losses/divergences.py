"""Divergences between two distributions over one vocabulary, as (value, derivative) pairs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# (log_q_CV, log_p_CV) -> (value_C, h_CV): q student, p teacher, both normalised log-probabilities in
# nats; h = d value / d log_q with every entry of log_q treated as free. The engine adds what
# normalisation contributes: d value / d logits = h - q * sum(h).
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student must cover everything the teacher does.

    Source: Hinton et al. 2015, arXiv:1503.02531, without the T^2 factor.
    """
    p_CV = log_p_CV.exp()
    return (p_CV * (log_p_CV - log_q_CV)).sum(-1), -p_CV


def reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student may leave out modes of the teacher, never invent one.

    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, equation 1.
    """
    q_CV = log_q_CV.exp()
    log_ratio_CV = log_q_CV - log_p_CV
    return (q_CV * log_ratio_CV).sum(-1), q_CV * (log_ratio_CV + 1)


def jensen_shannon(log_q_CV: Tensor, log_p_CV: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, equation 1; beta is the teacher's weight, 0 < beta < 1.
    """
    from math import log

    q_CV, p_CV = log_q_CV.exp(), log_p_CV.exp()
    log_m_CV = (log_p_CV + log(beta)).logaddexp(log_q_CV + log(1 - beta))
    h_CV = (1 - beta) * q_CV * (log_q_CV - log_m_CV)
    return (beta * p_CV * (log_p_CV - log_m_CV) + h_CV).sum(-1), h_CV
