"""The token that a model likes best, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.losses.head import OutputHead

_LOGITS = 2**24  # at once


@torch.no_grad()
def likeliest_tokens(hidden_RD: Tensor, head: OutputHead) -> Tensor:
    """[R] int64: the token with the largest logit in each row, of several that tie any."""
    rows = max(1, _LOGITS // head.vocabulary_size)
    best = [head.logits(some_CD).argmax(-1) for some_CD in torch.split(hidden_RD, rows)]
    return torch.cat(best)
