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
