"""Every divergence and method as its formula is written down: whole matrices of float32, for torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# (student_RV, teacher_RV) logits of any float dtype -> [] the sum over rows, differentiable.
Formula = Callable[[Tensor, Tensor], Tensor]


def _logs(student_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.log_softmax(student_RV, -1, dtype=torch.float32),
        torch.log_softmax(teacher_RV, -1, dtype=torch.float32),
    )


def _kl_R(log_a_RV: Tensor, log_b_RV: Tensor) -> Tensor:
    return (log_a_RV.exp() * (log_a_RV - log_b_RV)).sum(-1)


def forward_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """KL(p, q)."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    return _kl_R(log_p_RV, log_q_RV).sum()


def reverse_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """KL(q, p)."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    return _kl_R(log_q_RV, log_p_RV).sum()


def jensen_shannon(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """beta 0.5."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    log_m_RV = (0.5 * log_p_RV.exp() + 0.5 * log_q_RV.exp()).log()
    return (0.5 * _kl_R(log_p_RV, log_m_RV) + 0.5 * _kl_R(log_q_RV, log_m_RV)).sum()


def skewed_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """skew 0.1."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    return _kl_R(log_p_RV, (0.1 * log_p_RV.exp() + 0.9 * log_q_RV.exp()).log()).sum()


def skewed_reverse_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """skew 0.1."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    return _kl_R(log_q_RV, (0.1 * log_q_RV.exp() + 0.9 * log_p_RV.exp()).log()).sum()


def total_variation(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """Half the sum of |q - p|."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    return (log_q_RV.exp() - log_p_RV.exp()).abs().sum() / 2


def renyi(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """order 2."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    return (2 * log_p_RV - log_q_RV).logsumexp(-1).sum()


def alpha_beta(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """alpha 0.2, beta 0.7."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    alpha, beta, s = 0.2, 0.7, 0.9
    product_RV = (alpha * log_p_RV + beta * log_q_RV).exp()
    powers_RV = alpha / s * (s * log_p_RV).exp() + beta / s * (s * log_q_RV).exp()
    return (powers_RV - product_RV).sum() / (alpha * beta)


def adaptive_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """tail_mass 0.5, the tail found by sorting the vocabulary, as KDFlow's akl does."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    p_RV = log_p_RV.exp()
    ordered_RV, order_RV = p_RV.sort(-1)
    in_tail_RV = torch.zeros_like(p_RV).scatter(-1, order_RV, (ordered_RV.cumsum(-1) <= 0.5).float())
    gap_RV = (log_q_RV.exp() - p_RV).abs().detach()
    tail_R = (gap_RV * in_tail_RV).sum(-1) / gap_RV.sum(-1)
    return torch.lerp(_kl_R(log_p_RV, log_q_RV), _kl_R(log_q_RV, log_p_RV), tail_R).sum()


def masked_reverse_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """Where the two prefer different tokens."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    differs_R = (log_q_RV.argmax(-1) != log_p_RV.argmax(-1)).float()
    return (_kl_R(log_q_RV, log_p_RV) * differs_R).sum()


def entropy_gated_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """threshold 0.8, forward_weight 1."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    is_open_R = (-(log_p_RV.exp() * log_p_RV).sum(-1) > 0.8).float()
    return (_kl_R(log_q_RV, log_p_RV) + is_open_R * _kl_R(log_p_RV, log_q_RV)).sum()


def top1_cross_entropy(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """- p(y) log q(y)."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    log_best_R1, best_R1 = log_p_RV.max(-1, keepdim=True)
    return -(log_best_R1.exp() * log_q_RV.gather(-1, best_R1)).sum()


def hierarchical_ranking(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """top_k 5."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    q_RV, p_RV = log_q_RV.exp(), log_p_RV.exp()
    p_RJ, j_RJ = p_RV.topk(5)
    q_RM, m_RM = q_RV.topk(5)
    q_RJ, p_RM = q_RV.gather(-1, j_RJ), p_RV.gather(-1, m_RM)
    first = (q_RJ - q_RJ[:, :1]).relu().sum()
    above_RJM = (q_RM[:, None] - q_RJ[:, :, None]).relu() * (p_RJ[:, :, None] > p_RM[:, None])
    return first + above_RJM.sum()


def sampled_reverse_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """Of token 0, as if it had been drawn on every row."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    cost_R = (log_q_RV[:, 0] - log_p_RV[:, 0]).detach()
    policy_R = cost_R * log_q_RV[:, 0]
    return (policy_R - policy_R.detach() + cost_R).sum()


DIVERGENCES: Mapping[str, Formula] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
    "renyi": renyi,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
    "masked_reverse_kl": masked_reverse_kl,
    "entropy_gated_kl": entropy_gated_kl,
    "top1_cross_entropy": top1_cross_entropy,
    "hierarchical_ranking": hierarchical_ranking,
    "sampled_reverse_kl": sampled_reverse_kl,
}


def by_likelihood(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """ALM with tau 100 of rows that are each a run of one token, token 0."""
    log_q_RV, log_p_RV = _logs(student_RV, teacher_RV)
    log_b_R, log_a_R = log_q_RV[:, 0] / 100 - 1e-6, log_p_RV[:, 0] / 100 - 1e-6
    not_a_R, not_b_R = -torch.expm1(log_a_R), -torch.expm1(log_b_R)
    return 100 * (log_a_R.exp() * (log_a_R - log_b_R) + not_a_R * (not_a_R.log() - not_b_R.log())).sum()


def by_rank(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """ULD of such rows, over vocabularies of one size."""
    q_RV = torch.softmax(student_RV, -1, dtype=torch.float32).sort(-1, descending=True).values
    p_RV = torch.softmax(teacher_RV, -1, dtype=torch.float32).sort(-1, descending=True).values
    return (q_RV - p_RV).abs().sum()


def hybrid(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """GOLD of such rows with beta 0.5, where the first half of the vocabularies is the same, each half's weight 0.5."""
    num_matched = student_RV.shape[1] // 2
    q_RV = torch.softmax(student_RV, -1, dtype=torch.float32)
    p_RV = torch.softmax(teacher_RV, -1, dtype=torch.float32)
    same_q_RM, same_p_RM = q_RV[:, :num_matched], p_RV[:, :num_matched]
    log_m_RM = (0.5 * (same_q_RM + same_p_RM)).log()
    same = 0.5 * (same_p_RM * (same_p_RM.log() - log_m_RM) + same_q_RM * (same_q_RM.log() - log_m_RM)).sum()
    rest_q_RU = q_RV[:, num_matched:].sort(-1, descending=True).values
    rest_p_RU = p_RV[:, num_matched:].sort(-1, descending=True).values
    return 0.5 * same + 0.5 * (rest_q_RU - rest_p_RU).abs().sum()


ACROSS_TOKENIZERS: Mapping[str, Formula] = {"alm": by_likelihood, "uld": by_rank, "gold": hybrid}
