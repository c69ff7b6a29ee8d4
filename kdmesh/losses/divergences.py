"""Divergences between two distributions over one vocabulary: value and derivative, pure maths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (log_q_CV, log_p_CV) -> (value_C, h_CV), where q is the student, p the teacher.
#
# Both arguments are normalised log-probabilities in nats, one row per token. value is the divergence
# of each row; h = d value / d log_q with every entry of log_q treated as free. The caller adds what
# normalisation contributes: d value / d logits = h - q sum(h). So nothing here knows of logits,
# temperature, weights or chunks.
#
# The arguments are scratch: a divergence may overwrite them and return them, which saves memory
# traffic. It must not keep them. It is called for a few rows at a time, on several threads at once.
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student must cover everything the teacher does.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, up to the teacher's entropy and without the
    factor T^2.
    """
    log_ratio_CV = torch.sub(log_p_CV, log_q_CV, out=log_q_CV)
    p_CV = log_p_CV.exp_()
    return log_ratio_CV.mul_(p_CV).sum(-1), p_CV.neg_()


def reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student may leave modes of the teacher out, but not invent one.

    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, equation 1.
    """
    log_ratio_CV = torch.sub(log_q_CV, log_p_CV, out=log_p_CV)
    q_CV = log_q_CV.exp_()
    return torch.linalg.vecdot(q_CV, log_ratio_CV), log_ratio_CV.add_(1).mul_(q_CV)


def jensen_shannon(log_q_CV: Tensor, log_p_CV: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; bounded, 0 < beta < 1.

    Near forward KL for a small beta and near reverse KL for a large one, once divided by beta or
    1 - beta. With beta 0.5 it is symmetric and at most ln 2.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, equation 1; beta weighs the teacher.
    """
    q_CV, p_CV = log_q_CV.exp(), log_p_CV.exp()
    # Where both have underflowed, m is 0 and its logarithm must stay finite to be multiplied by 0.
    log_m_CV = torch.lerp(q_CV, p_CV, beta).clamp_min_(torch.finfo(q_CV.dtype).tiny).log_()
    h_CV = log_q_CV.sub_(log_m_CV).mul_(q_CV).mul_(1 - beta)
    return torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_m_CV)).mul_(beta).add_(h_CV.sum(-1)), h_CV


def skewed_kl(log_q_CV: Tensor, log_p_CV: Tensor, *, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || skew p + (1 - skew) q): forward KL that is bounded where the student is far away; 0 < skew < 1.

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    q_CV, p_CV = log_q_CV.exp_(), log_p_CV.exp()
    m_CV = torch.lerp(q_CV, p_CV, skew).clamp_min_(torch.finfo(q_CV.dtype).tiny)
    h_CV = q_CV.mul_(p_CV).div_(m_CV).mul_(skew - 1)
    return torch.linalg.vecdot(p_CV, log_p_CV.sub_(m_CV.log_())), h_CV


def skewed_reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, *, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || skew q + (1 - skew) p): reverse KL that is bounded where the teacher is far away; 0 < skew < 1.

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    q_CV, p_CV = log_q_CV.exp(), log_p_CV.exp_()
    m_CV = torch.lerp(p_CV, q_CV, skew).clamp_min_(torch.finfo(q_CV.dtype).tiny)
    share_CV = torch.div(q_CV, m_CV).mul_(skew)  # of m that is the student's
    log_ratio_CV = log_q_CV.sub_(m_CV.log_())
    value_C = torch.linalg.vecdot(q_CV, log_ratio_CV)
    return value_C, log_ratio_CV.add_(1).sub_(share_CV).mul_(q_CV)


def total_variation(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Half the sum of |q - p|: symmetric and at most 1; its derivative does not fade near the teacher.

    Source: Wen et al. 2023 (f-DISTILL), arXiv:2307.15190.
    """
    q_CV = log_q_CV.exp_()
    difference_CV = torch.sub(q_CV, log_p_CV.exp_(), out=log_p_CV)
    value_C = torch.linalg.vector_norm(difference_CV, ord=1, dim=-1) / 2
    return value_C, difference_CV.sign_().mul_(q_CV).div_(2)


def renyi(log_q_CV: Tensor, log_p_CV: Tensor, *, order: float) -> tuple[Tensor, Tensor]:
    """log(sum of p^order q^(1 - order)) / (order - 1): forward KL at order 1, which is left out; order > 0.

    The larger the order, the more count the tokens that the student finds too unlikely.

    Source: van Erven and Harremoes 2014, arXiv:1206.2459.
    """
    power_CV = torch.lerp(log_q_CV, log_p_CV, order)
    log_sum_C = power_CV.logsumexp(-1)
    return log_sum_C / (order - 1), power_CV.sub_(log_sum_C[:, None]).exp_().neg_()


def alpha_beta(log_q_CV: Tensor, log_p_CV: Tensor, *, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The sum of alpha/s p^s + beta/s q^s - p^alpha q^beta, over alpha beta, where s = alpha + beta; both above 0.

    A large alpha concentrates on tokens that the teacher likes, a large beta on those that the student does: near
    (1, 0) it is forward KL, near (0, 1) reverse KL.

    Source: Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki et al. 2011, doi:10.3390/e13010134.
    """
    s = alpha + beta
    # Powers of the smaller of the two over the larger: equals give exactly 0, and nothing overflows.
    larger_CV = torch.maximum(log_q_CV, log_p_CV)
    excess_CV = torch.sub(log_q_CV, log_p_CV)
    under_CV, over_CV = excess_CV.clamp_max(0), excess_CV.clamp_min(0).neg_()
    bracket_CV = torch.expm1(s * under_CV).mul_(beta / s).sub_(torch.expm1(beta * under_CV))
    bracket_CV.add_(torch.expm1(s * over_CV).mul_(alpha / s)).sub_(torch.expm1(alpha * over_CV))
    value_C = torch.linalg.vecdot(torch.exp(s * larger_CV), bracket_CV) / (alpha * beta)
    # q^beta (q^alpha - p^alpha) / alpha
    smaller_CV = torch.expm1(over_CV.add_(under_CV).mul_(alpha)).mul_(excess_CV.sign_()).div_(-alpha)
    return value_C, larger_CV.mul_(alpha).add_(log_q_CV, alpha=beta).exp_().mul_(smaller_CV)
