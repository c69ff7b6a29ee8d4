"""The losses as a textbook writes them: whole matrices, float64, autograd; shares no line with kdmesh.losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """What a head does after its matrix product."""

    scale: float = 1.0
    softcap: float | None = None


def logits(hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transform: Transform) -> Tensor:
    """[R, V] float64."""
    z_RV = torch.einsum("rd,vd->rv", hidden_RD.double(), weight_VD.double())
    if bias_V is not None:
        z_RV = z_RV + bias_V.double()
    z_RV = transform.scale * z_RV
    return z_RV if transform.softcap is None else transform.softcap * torch.tanh(z_RV / transform.softcap)


def kullback_leibler(p_RV: Tensor, r_RV: Tensor) -> Tensor:
    """[R] KL(p || r) in nats."""
    return (p_RV * (p_RV.log() - r_RV.log())).sum(-1)


def divergence(name: str, q_RV: Tensor, p_RV: Tensor, params: Mapping[str, float], labels_R: Tensor | None) -> Tensor:
    """[R] of student q from teacher p; its gradient is the one that is meant, also where a part counts as constant."""
    if name == "sampled_reverse_kl":
        assert labels_R is not None
        return _sampled_reverse_kl(q_RV, p_RV, labels_R)
    return DIVERGENCES[name](q_RV, p_RV, **params)


def jensen_shannon(q_RV: Tensor, p_RV: Tensor, beta: float) -> Tensor:
    """[R]"""
    m_RV = beta * p_RV + (1 - beta) * q_RV
    return beta * kullback_leibler(p_RV, m_RV) + (1 - beta) * kullback_leibler(q_RV, m_RV)


def alpha_beta(q_RV: Tensor, p_RV: Tensor, alpha: float, beta: float) -> Tensor:
    """[R]"""
    s = alpha + beta
    terms_RV = p_RV**alpha * q_RV**beta - alpha / s * p_RV**s - beta / s * q_RV**s
    return -terms_RV.sum(-1) / (alpha * beta)


def in_tail(p_RV: Tensor, mass: float) -> Tensor:
    """[R, V] bool: the least likely tokens whose sum is `mass` at most, by sorting."""
    ordered_RV, order_RV = p_RV.sort(-1)
    return torch.zeros_like(p_RV, dtype=torch.bool).scatter(-1, order_RV, ordered_RV.cumsum(-1) <= mass)


def adaptive_kl(q_RV: Tensor, p_RV: Tensor, tail_mass: float) -> Tensor:
    """[R]"""
    gap_RV = (p_RV - q_RV).abs().detach()
    tail_R = (gap_RV * in_tail(p_RV, tail_mass)).sum(-1)
    head_R = gap_RV.sum(-1) - tail_R
    mixed_R = head_R * kullback_leibler(p_RV, q_RV) + tail_R * kullback_leibler(q_RV, p_RV)
    return mixed_R / (head_R + tail_R)


def entropy_gated_kl(q_RV: Tensor, p_RV: Tensor, threshold: float, forward_weight: float) -> Tensor:
    """[R]"""
    is_open_R = -(p_RV * p_RV.log()).sum(-1) > threshold
    return kullback_leibler(q_RV, p_RV) + is_open_R.double() * forward_weight * kullback_leibler(p_RV, q_RV)


def hierarchical_ranking(q_RV: Tensor, p_RV: Tensor, top_k: int) -> Tensor:
    """[R], token by token."""
    rows = []
    for q_V, p_V in zip(q_RV, p_RV, strict=True):
        teachers = p_V.argsort(descending=True)[:top_k].tolist()
        students = q_V.argsort(descending=True)[:top_k].tolist()
        terms = [torch.relu(q_V[j] - q_V[teachers[0]]) for j in teachers]
        terms += [torch.relu(q_V[m] - q_V[j]) for j in teachers for m in students if p_V[j] > p_V[m]]
        rows.append(torch.stack(terms).sum())
    return torch.stack(rows)


def truncated(q_RV: Tensor, p_RV: Tensor, is_merged_RV: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each row, (q, p) [1, kept + 1]: the tokens that are kept, and the sum of the others where there is one."""

    def merged(p_V: Tensor, is_merged_V: Tensor) -> Tensor:
        bucket = [p_V[is_merged_V].sum()[None]] if is_merged_V.any() else []
        return torch.cat([p_V[~is_merged_V], *bucket])[None]

    return [
        (merged(q_V, is_merged_V), merged(p_V, is_merged_V))
        for q_V, p_V, is_merged_V in zip(q_RV, p_RV, is_merged_RV, strict=True)
    ]


DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": lambda q_RV, p_RV: kullback_leibler(p_RV, q_RV),
    "reverse_kl": lambda q_RV, p_RV: kullback_leibler(q_RV, p_RV),
    "jensen_shannon": jensen_shannon,
    "skewed_kl": lambda q_RV, p_RV, skew: kullback_leibler(p_RV, skew * p_RV + (1 - skew) * q_RV),
    "skewed_reverse_kl": lambda q_RV, p_RV, skew: kullback_leibler(q_RV, skew * q_RV + (1 - skew) * p_RV),
    "total_variation": lambda q_RV, p_RV: (q_RV - p_RV).abs().sum(-1) / 2,
    "renyi": lambda q_RV, p_RV, order: (p_RV**order * q_RV ** (1 - order)).sum(-1).log() / (order - 1),
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
    "masked_reverse_kl": lambda q_RV, p_RV: (q_RV.argmax(-1) != p_RV.argmax(-1)) * kullback_leibler(q_RV, p_RV),
    "entropy_gated_kl": entropy_gated_kl,
    "top1_cross_entropy": lambda q_RV, p_RV: (
        -(p_RV.amax(-1) * q_RV.gather(-1, p_RV.argmax(-1, keepdim=True))[:, 0].log())
    ),
    "hierarchical_ranking": hierarchical_ranking,
}


def _sampled_reverse_kl(q_RV: Tensor, p_RV: Tensor, labels_R: Tensor) -> Tensor:
    rows_R = torch.arange(len(labels_R))
    log_q_R = q_RV[rows_R, labels_R].log()
    cost_R = (log_q_R - p_RV[rows_R, labels_R].log()).detach()
    policy_R = cost_R * log_q_R
    return policy_R - policy_R.detach() + cost_R


def softmax(z_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """[R, V] probabilities."""
    e_RV = torch.exp((z_RV - z_RV.amax(-1, keepdim=True)) / temperature)
    return e_RV / e_RV.sum(-1, keepdim=True)


def cross_entropy(z_RV: Tensor, labels_R: Tensor) -> Tensor:
    """[R] in nats."""
    rows_R = torch.arange(len(labels_R))
    return -softmax(z_RV)[rows_R, labels_R].log()
