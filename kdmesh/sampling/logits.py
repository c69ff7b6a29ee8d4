"""The logits that tokens are drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.losses.head import OutputHead
from kdmesh.losses.matmul import logits_into
from kdmesh.losses.workspace import Workspace


def sampling_logits(head: OutputHead, hidden_BD: Tensor, workspace: Workspace) -> Tensor:
    """[B, V] float32 over the head's tokens, without gradient; OutputHead.logits without a cast copy of the head."""
    if hidden_BD.dtype not in (torch.float32, torch.bfloat16) or hidden_BD.dtype != head.weight_VD.dtype:
        return head.logits(hidden_BD)
    logits_BV = hidden_BD.new_empty(len(hidden_BD), head.vocabulary_size, dtype=torch.float32)
    logits_into(logits_BV, hidden_BD, head.weight_VD, workspace)
    if head.bias_V is not None:
        logits_BV += head.bias_V
    logits_BV *= head.logit_scale
    if head.logit_softcap is None:
        return logits_BV
    return logits_BV.div_(head.logit_softcap).tanh_().mul_(head.logit_softcap)
