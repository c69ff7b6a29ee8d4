"""The linear map between two models' hidden states that keeps their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.losses import OutputHead

_BLOCK_TOKENS = 8192


def logit_preserving_map(source: OutputHead, target: OutputHead, device: torch.device) -> Tensor:
    """[E, D] float64 on `device`: M with which `target` makes of M h the logits nearest to those of `source` from h.

    That is pinv(W_target) W_source, through products of the heads' columns, so that no matrix as long as the vocabulary
    is made. Biases and soft caps are left out.

    Args:
        source: [V, D], over the same tokens as `target`.
        target: [V, E].
    """
    gram_EE = torch.zeros(target.hidden_size, target.hidden_size, dtype=torch.float64, device=device)
    cross_ED = torch.zeros(target.hidden_size, source.hidden_size, dtype=torch.float64, device=device)
    blocks = zip(
        torch.split(target.weight_VD, _BLOCK_TOKENS), torch.split(source.weight_VD, _BLOCK_TOKENS), strict=True
    )
    for target_CE, source_CD in blocks:
        own_CE = target_CE.to(device, torch.float64)
        gram_EE.addmm_(own_CE.T, own_CE)
        cross_ED.addmm_(own_CE.T, source_CD.to(device, torch.float64))
    inverse_EE: Tensor = torch.linalg.pinv(gram_EE, hermitian=True)
    return inverse_EE @ cross_ED * (source.logit_scale / target.logit_scale)
