"""Layers that carry a state from token to token, made to begin anew with every sequence of a packed row."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.models.cached_attention import NextTokens, Prompts
from kdmesh.models.cached_mixing import cached_mixing

RECURRENT_LAYERS = {
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen3_5_moe_text": "Qwen3_5MoeGatedDeltaNet",
    "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
}
"""Model type of the language model -> class of the modules that mix tokens in its linear attention layers, of those
that are known to work."""

LINEAR_ATTENTION = "linear_attention"


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether some layers of the model are linear attention."""
    return LINEAR_ATTENTION in (getattr(config.get_text_config(), "layer_types", None) or [])


def begin_with_every_sequence(model: PreTrainedModel) -> None:
    """Let the recurrent layers of RECURRENT_LAYERS take each of the `packed_lengths` that they are told by itself.

    Names of parameters stay as they are, and copies of the model do the same. Told nothing, a layer is transformers'
    own.
    """
    name = RECURRENT_LAYERS.get(model.config.get_text_config().model_type)
    for module in model.modules():
        if type(module).__name__ == name:
            module.__class__ = _packed(type(module))  # type: ignore[arg-type] # classes can be hashed


# Another class, rather than a hook or a wrapped method: those would be bound to one module, and copies share them.
@cache
def _packed(layer: type[nn.Module]) -> type[nn.Module]:
    class PackedLayer(layer):  # type: ignore[misc,valid-type]
        def forward(
            self,
            hidden_states: Tensor,
            *,
            packed_lengths: tuple[int, ...] | None = None,
            decoding: Prompts | NextTokens | None = None,
            **kwargs: Any,
        ) -> Tensor:
            if decoding is not None:
                return cached_mixing(partial(super().forward, **kwargs), self.layer_idx, hidden_states, decoding)
            lengths = packed_lengths or (hidden_states.shape[1],)
            parts = torch.split(hidden_states, list(lengths), dim=1)
            return torch.cat([super(PackedLayer, self).forward(part, **kwargs) for part in parts], dim=1)

    PackedLayer.__name__ = PackedLayer.__qualname__ = f"Packed{layer.__name__}"
    return PackedLayer
