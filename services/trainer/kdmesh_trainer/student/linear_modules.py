"""The linear modules of a student's body, which adapters are put on and which are rounded."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def linear_modules(lm: PreTrainedModel) -> list[str]:
    """Their names in the model; none where a body has others."""
    body = lm.get_decoder()
    prefix = next(name for name, module in lm.named_modules() if module is body)
    return [f"{prefix}.{name}" for name, module in body.named_modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    """A router may be a linear module that computes something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
