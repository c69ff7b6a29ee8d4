"""Routers of mixtures of experts, for comparisons that a rounding must not decide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

# How transformers' routers call a number of theirs, and what that is at most.
_CHOSEN = (("top_k", "num_experts"), ("topk_group", "n_group"))


@contextmanager
def steady_routing(model: PreTrainedModel) -> Iterator[None]:
    """Send every token to all experts, as long as it lasts, where `model` computes in 16 bits.

    Rounding decides there between experts that a router likes equally, and a token's hidden states jump with it.
    """
    held = []
    if model.dtype not in (torch.float32, torch.float64):
        for module in model.modules():
            for name, most in _CHOSEN:
                chosen, number = (getattr(module, key, None) for key in (name, most))
                if type(chosen) is int and type(number) is int:
                    held.append((module, name, chosen, number))
    for module, name, _, number in held:
        setattr(module, name, number)
    try:
        yield
    finally:
        for module, name, chosen, _ in held:
            setattr(module, name, chosen)
