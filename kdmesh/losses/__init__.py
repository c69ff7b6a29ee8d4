"""Losses between a student's and a teacher's distributions, in bounded memory."""

from __future__ import annotations

from kdmesh.losses.build import build_divergence, custom_divergence
from kdmesh.losses.divergences import Divergence, forward_kl, jensen_shannon, reverse_kl
from kdmesh.losses.fused_linear import FusedLoss, fused_linear_cross_entropy, fused_linear_divergence
from kdmesh.losses.head import OutputHead
from kdmesh.losses.hidden_distance import cosine_distance, mean_squared_distance
from kdmesh.losses.likeliest import likeliest_tokens
from kdmesh.losses.mixture import MixedTeacher
from kdmesh.losses.rows import Mix
from kdmesh.losses.sampled import SampledDivergence
from kdmesh.losses.spread.across_ranks import CROSS_ENTROPY, fused_linear_across_ranks
from kdmesh.losses.spread.slice_form import slice_form
from kdmesh.losses.spread.slice_sweep import OwnRows
from kdmesh.losses.spread.vocabulary_share import VocabularyShare
from kdmesh.losses.truncated import truncated
from kdmesh.losses.two_vocabularies.across_vocabularies import fused_linear_by_rank, fused_linear_hybrid
from kdmesh.losses.two_vocabularies.chunk_likelihood import Boundaries, fused_linear_chunk_likelihood
from kdmesh.losses.two_vocabularies.labelled import ChunkLoss, ChunkRows, LabelledRows
from kdmesh.losses.two_vocabularies.sorted_rows import HybridWeights, Matched
from kdmesh.losses.workspace import Workspace

__all__ = [
    "CROSS_ENTROPY",
    "Boundaries",
    "ChunkLoss",
    "ChunkRows",
    "Divergence",
    "FusedLoss",
    "HybridWeights",
    "LabelledRows",
    "Matched",
    "Mix",
    "MixedTeacher",
    "OutputHead",
    "OwnRows",
    "SampledDivergence",
    "VocabularyShare",
    "Workspace",
    "build_divergence",
    "cosine_distance",
    "custom_divergence",
    "forward_kl",
    "fused_linear_across_ranks",
    "fused_linear_by_rank",
    "fused_linear_chunk_likelihood",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_hybrid",
    "jensen_shannon",
    "likeliest_tokens",
    "mean_squared_distance",
    "reverse_kl",
    "slice_form",
    "truncated",
]
