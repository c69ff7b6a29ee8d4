"""A divergence over the teacher's likeliest tokens and one bucket with all the others."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kdmesh.losses.divergences import Divergence
from kdmesh.losses.least_likely import least_likely

# A log-probability whose probability, and any positive power of it, is 0; finite, so that 0 times it is 0.
_NEVER = -1e30


def truncated(divergence: Divergence, *, top_k: int | None = None, top_p: float | None = None) -> Divergence:
    """`divergence` of the two distributions in which the tokens that are not kept are one.

    Kept are the teacher's likeliest `top_k`, or the fewest that have `top_p` together (tokens of one probability
    all or none). The student is told how likely the others are, but not which of them.

    Source: the bucket is that of Anshumann et al. 2025, arXiv:2503.16870, without sampling.
    """
    assert (top_k is None) != (top_p is None)
    return partial(_of_kept, divergence=divergence, top_k=top_k, top_p=top_p)


def _of_kept(
    log_q_CV: Tensor, log_p_CV: Tensor, *, divergence: Divergence, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    if top_p is not None:
        is_merged_CV = least_likely(log_p_CV.exp(), 1 - top_p)
    else:
        assert top_k is not None
        kept_CK = log_p_CV.topk(min(top_k, log_p_CV.shape[-1])).indices
        is_merged_CV = torch.ones_like(log_p_CV, dtype=torch.bool).scatter_(-1, kept_CK, False)
    merged_q_CV, q_C1 = _merged(log_q_CV, is_merged_CV)
    merged_p_CV, _ = _merged(log_p_CV, is_merged_CV)
    value_C, h_CV = divergence(merged_q_CV, merged_p_CV)
    # log q of the bucket is the logarithm of its members' sum, in which each has its share.
    shares_CV = log_q_CV.sub_(q_C1).clamp_max_(0).exp_()
    return value_C, torch.where(is_merged_CV, h_CV[:, -1:] * shares_CV, h_CV[:, :-1])


def _merged(log_CV: Tensor, is_merged_CV: Tensor) -> tuple[Tensor, Tensor]:
    """[C, V + 1] with the bucket last, and [C, 1] of the bucket alone."""
    bucket_C1 = log_CV.masked_fill(~is_merged_CV, -torch.inf).logsumexp(-1, keepdim=True).clamp_min_(_NEVER)
    return torch.cat([log_CV.masked_fill(is_merged_CV, _NEVER), bucket_C1], dim=-1), bucket_C1
