"""The losses as a textbook writes them: whole matrices, float64, autograd; shares no line with kdmesh.losses."""

from __future__ import annotations

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


def divergence(name: str, q_RV: Tensor, p_RV: Tensor, *, beta: float = 0.5) -> Tensor:
    """[R] of student q from teacher p."""
    if name == "forward_kl":
        return kullback_leibler(p_RV, q_RV)
    if name == "reverse_kl":
        return kullback_leibler(q_RV, p_RV)
    m_RV = beta * p_RV + (1 - beta) * q_RV
    return beta * kullback_leibler(p_RV, m_RV) + (1 - beta) * kullback_leibler(q_RV, m_RV)


def softmax(z_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """[R, V] probabilities."""
    e_RV = torch.exp((z_RV - z_RV.amax(-1, keepdim=True)) / temperature)
    return e_RV / e_RV.sum(-1, keepdim=True)


def cross_entropy(z_RV: Tensor, labels_R: Tensor) -> Tensor:
    """[R] in nats."""
    rows_R = torch.arange(len(labels_R))
    return -softmax(z_RV)[rows_R, labels_R].log()
