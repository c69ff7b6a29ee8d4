"""Divergences that treat some tokens, or some rows, in another way than the rest. In the form of `Divergence`."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.losses.divergences import forward_kl, reverse_kl
from kdmesh.losses.least_likely import least_likely


def adaptive_kl(log_q_CV: Tensor, log_p_CV: Tensor, *, tail_mass: float) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL, weighed by how much of the gap |p - q| lies in the teacher's head and in its tail.

    The tail are the teacher's least likely tokens whose probabilities add up to `tail_mass` at most, tokens of one
    probability all or none. The weights are constants of the derivative; where p = q both are a half.

    Source: Wu et al. 2024 (AKL), arXiv:2404.02657.
    """
    p_CV = log_p_CV.exp()
    gap_CV = log_q_CV.exp().sub_(p_CV).abs_()
    gap_C = gap_CV.sum(-1)
    tail_gap_C = gap_CV.mul_(least_likely(p_CV, tail_mass)).sum(-1)
    tail_weight_C = torch.where(gap_C > 0, tail_gap_C / gap_C, 0.5)
    forward_C, forward_CV = forward_kl(log_q_CV.clone(), log_p_CV.clone())
    reverse_C, reverse_CV = reverse_kl(log_q_CV, log_p_CV)
    h_CV = torch.lerp(forward_CV, reverse_CV, tail_weight_C[:, None])
    return torch.lerp(forward_C, reverse_C, tail_weight_C), h_CV


def masked_reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL on rows where the two prefer different tokens, 0 on the others.

    Source: KDFlow 0.2, `masked_rkl`.
    """
    differs_C = (log_q_CV.argmax(-1) != log_p_CV.argmax(-1)).to(log_q_CV.dtype)
    value_C, h_CV = reverse_kl(log_q_CV, log_p_CV)
    return value_C * differs_C, h_CV.mul_(differs_C[:, None])


def entropy_gated_kl(
    log_q_CV: Tensor, log_p_CV: Tensor, *, threshold: float, forward_weight: float
) -> tuple[Tensor, Tensor]:
    """Reverse KL, and `forward_weight` times forward KL more on rows where the teacher's entropy exceeds `threshold`.

    Where the teacher is sure, the student is to imitate precisely; where it is not, to stay as open.

    Source: Jin et al. 2026 (EOPD), arXiv:2603.07079.
    """
    entropy_C = -torch.linalg.vecdot(log_p_CV.exp(), log_p_CV)
    weight_C = (entropy_C > threshold).to(log_q_CV.dtype) * forward_weight
    forward_C, forward_CV = forward_kl(log_q_CV.clone(), log_p_CV.clone())
    reverse_C, h_CV = reverse_kl(log_q_CV, log_p_CV)
    return reverse_C.addcmul_(forward_C, weight_C), h_CV.addcmul_(forward_CV, weight_C[:, None])


def top1_cross_entropy(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy against the teacher's likeliest token, times its probability. Not 0 for equals.

    Source: KDFlow 0.1, `top1_ce`.
    """
    log_best_C1, best_C1 = log_p_CV.max(-1, keepdim=True)
    weight_C1 = log_best_C1.exp()
    value_C = -(weight_C1 * log_q_CV.gather(-1, best_C1))[:, 0]
    return value_C, log_q_CV.zero_().scatter_(-1, best_C1, -weight_C1)


def hierarchical_ranking(log_q_CV: Tensor, log_p_CV: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """How far the student's probabilities are out of the teacher's order, among the likeliest `top_k` tokens of each.

    The sum over the teacher's likeliest j of max(0, q_j - q_first), first being its likeliest of all, and over its
    likeliest j and the student's likeliest m with p_j > p_m of max(0, q_m - q_j). 0 for every student in that order.

    Source: KDFlow 0.1, `hrl`, with the teacher's probabilities in the comparison of j with m.
    """
    top_k = min(top_k, log_p_CV.shape[-1])
    q_CV = log_q_CV.exp_()
    p_CV = log_p_CV.exp_()
    p_CJ, j_CJ = p_CV.topk(top_k)
    q_CM, m_CM = q_CV.topk(top_k)
    q_CJ, p_CM = q_CV.gather(-1, j_CJ), p_CV.gather(-1, m_CM)
    above_first_CJ = q_CJ - q_CJ[:, :1]
    above_CJM = torch.where(p_CJ[:, :, None] > p_CM[:, None], q_CM[:, None] - q_CJ[:, :, None], 0)
    value_C = above_first_CJ.relu().sum(-1) + above_CJM.relu().sum((-1, -2))
    # How often each token's probability is added.
    times_CJ = (above_first_CJ > 0).to(q_CV.dtype)
    times_CJM = (above_CJM > 0).to(q_CV.dtype)
    times_CV = log_p_CV.zero_()
    times_CV.scatter_add_(-1, j_CJ[:, :1], -times_CJ.sum(-1, keepdim=True))
    times_CV.scatter_add_(-1, j_CJ, times_CJ - times_CJM.sum(-1))
    times_CV.scatter_add_(-1, m_CM, times_CJM.sum(-2))
    return value_C, times_CV.mul_(q_CV)
