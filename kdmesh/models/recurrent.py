"""Layers that carry a state from token to token, made to begin anew with every sequence of a packed row."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.models.decoding.cached_attention import NextTokens, Prompts
from kdmesh.models.decoding.cached_mixing import cached_mixing

RECURRENT_LAYERS = {
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "lfm2": "Lfm2ShortConv",
    "lfm2_moe": "Lfm2MoeShortConv",
    "lfm3": "Lfm3ShortConv",
    "nemotron_h": "NemotronHMamba2Mixer",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen3_5_moe_text": "Qwen3_5MoeGatedDeltaNet",
    "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
}
"""Model type of the language model -> class of the modules that carry a state from token to token, of those that are
known to work."""

RECURRENT_TYPES = frozenset({"conv", "hybrid", "linear_attention"})
"""Types of layers that have such a module: a short convolution; Mamba-2 beside attention; Mamba-2 or a delta rule."""

_LIMIT = "time_step_limit"
_NO_LIMIT = (0.0, float("inf"))  # they are softplus of something


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether some layers of the model carry a state from token to token."""
    return not RECURRENT_TYPES.isdisjoint(getattr(config.get_text_config(), "layer_types", None) or [])


def begin_with_every_sequence(model: PreTrainedModel) -> None:
    """Let the recurrent layers of RECURRENT_LAYERS take each of the `packed_lengths` that they are told by itself.

    Names of parameters stay as they are, and copies of the model do the same. Told nothing, a layer is transformers'
    own, but for the limits of Mamba-2's time steps, which are those of the configuration.
    """
    config = model.config.get_text_config()
    name = RECURRENT_LAYERS.get(config.model_type)
    for module in model.modules():
        if type(module).__name__ == name:
            module.__class__ = _packed(type(module))  # type: ignore[arg-type] # classes can be hashed
            if hasattr(module, _LIMIT):
                # transformers 5.24 takes nemotron_h's from time_step_min, which is of the initialisation alone:
                # https://github.com/huggingface/transformers/pull/48989
                setattr(module, _LIMIT, tuple(config.time_step_limit))


def decoding_refusal(model: PreTrainedModel) -> str | None:
    """Why recurrent layers cannot go on from a state as they compute whole sequences; None: they can."""
    limits = {getattr(module, _LIMIT, _NO_LIMIT) for module in model.modules()} - {_NO_LIMIT}
    if not limits:
        return None
    return f"time steps are limited to {sorted(limits)[0]}, and transformers does so in whole sequences alone"


# Another class, rather than a hook or a wrapped method: those would be bound to one module, and copies share them.
@cache
def _packed(layer: type[nn.Module]) -> type[nn.Module]:
    class PackedLayer(layer):  # type: ignore[misc,valid-type]
        # In training Mamba-2 has a kernel that reads weights past what stands in a part's place, as an adapter does.
        training = property(lambda self: False, lambda self, mode: None)

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
