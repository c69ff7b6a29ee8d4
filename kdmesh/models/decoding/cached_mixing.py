"""Layers that carry a state, for decoding: whole prompts when they join, then one token of every row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdmesh.errors import ConfigError
from kdmesh.models.decoding.cached_attention import NextTokens, Prompts


class LayerStates:
    """What a recurrent layer of transformers asks of a cache; all sequences have begun, or none has.

    `layer_idx` and `state_idx` are not looked at: there is one state of each kind.
    """

    def __init__(self, conv: Tensor | None = None, recurrent: Tensor | None = None) -> None:
        """Those that are given are changed in place; None: the sequences begin."""
        self.conv = conv  # [B, channels, kernel size], the newest inputs of the convolution
        self.recurrent = recurrent  # [B, heads, ...]; a short convolution has none

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """[B, channels, kernel size]; None where the sequences begin."""
        return self.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """[B, heads, ...]; None where the sequences begin."""
        return self.recurrent

    def is_recording_past(self, layer_idx: int) -> bool:
        """Nothing is ever taken back."""
        return False

    def update_conv_state(
        self, inputs: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int, **kwargs: Any
    ) -> Tensor:
        """Keep the newest of a beginning's inputs, [B, channels, tokens], with zeros before them where they are few.

        Returns:
            the inputs.
        """
        assert self.conv is None
        self.conv = pad(inputs, (max(conv_kernel_size - inputs.shape[-1], 0), 0))[..., -conv_kernel_size:]
        return inputs

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep the state behind the last token.

        Returns:
            the state.
        """
        self.recurrent = state if self.recurrent is None else self.recurrent.copy_(state)
        return self.recurrent


def cached_mixing(
    mix: Callable[..., Tensor], layer: int, hidden_states: Tensor, decoding: Prompts | NextTokens
) -> Tensor:
    """[1, T, D] outputs of a layer that carries a state; stores the states of its rows.

    Args:
        mix: the layer's own forward, of [B, tokens, D] and a `cache`.
        hidden_states: [1, T, D], the inputs of prompts end to end, or of one token for each row.

    Raises:
        ConfigError: `mix` is that of a version of transformers with another kind of cache.
    """
    if isinstance(decoding, NextTokens):
        states = LayerStates(*decoding.cache.states(layer, hidden_states.shape[1]))
        return mix(hidden_states.transpose(0, 1), cache=states).transpose(0, 1)
    outputs = []
    for row, part in zip(decoding.rows, torch.split(hidden_states, list(decoding.lengths), dim=1), strict=True):
        begun = LayerStates()
        outputs.append(mix(part, cache=begun))
        if begun.conv is None:
            raise ConfigError(
                "its recurrent layer leaves no state in the cache that it is given; use transformers 5.24"
            )
        left = [begun.conv] if begun.recurrent is None else [begun.conv, begun.recurrent]
        decoding.cache.write_states(layer, row, *(state[0] for state in left))
    return torch.cat(outputs, dim=1)
