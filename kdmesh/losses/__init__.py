"""Losses between a student's and a teacher's distributions, in bounded memory."""

from __future__ import annotations

from kdmesh.losses.build import build_divergence, custom_divergence
from kdmesh.losses.divergences import Divergence, forward_kl, jensen_shannon, reverse_kl
from kdmesh.losses.fused_linear import FusedLoss, fused_linear_cross_entropy, fused_linear_divergence
from kdmesh.losses.head import OutputHead
from kdmesh.losses.mixture import MixedTeacher
from kdmesh.losses.sampled import SampledDivergence
from kdmesh.losses.truncated import truncated
from kdmesh.losses.workspace import Workspace

__all__ = [
    "Divergence",
    "FusedLoss",
    "MixedTeacher",
    "OutputHead",
    "SampledDivergence",
    "Workspace",
    "build_divergence",
    "custom_divergence",
    "forward_kl",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "jensen_shannon",
    "reverse_kl",
    "truncated",
]
