"""Keys and values, and states of recurrent layers, of the sequences that are being decoded, one row each."""

from __future__ import annotations

import torch
from torch import Tensor

_ROOM = 64  # tokens; room is made in multiples of this


class KvCache:
    """Rows 0 to num_rows - 1 are in use; a layer's tensors are made when it first stores something.

    Not for gradients. Every layer must be written in every forward.
    """

    def __init__(self, *, rows: int, tokens: int) -> None:
        """Room for so many, to begin with; both grow on `reserve`."""
        self._rows = max(rows, 1)
        self._tokens = _rounded(tokens)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # each [rows, key heads, tokens, dim]
        self._states: dict[int, tuple[Tensor, ...]] = {}  # each [rows, ...]: of a recurrent layer

    def reserve(self, *, rows: int, tokens: int) -> None:
        """Make room for at least so many rows, of at least so many tokens each; what is too small is doubled."""
        if rows <= self._rows and tokens <= self._tokens:
            return
        self._rows = self._rows if rows <= self._rows else max(rows, 2 * self._rows)
        self._tokens = self._tokens if tokens <= self._tokens else max(_rounded(tokens), 2 * self._tokens)
        for layer, pair in self._layers.items():
            keys, values = (self._grown(states) for states in pair)
            self._layers[layer] = keys, values
        for layer, held in self._states.items():
            if len(held[0]) < self._rows:
                self._states[layer] = tuple(_with_rows(states, self._rows) for states in held)

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Store the first tokens of a row: keys and values are [key heads, tokens, dim]."""
        for stored, new in zip(self._of(layer, keys, values), (keys, values), strict=True):
            stored[row, :, : new.shape[1]] = new

    def append(self, layer: int, lengths_B: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token of each of the first B rows at their `lengths_B`.

        Returns:
            all keys and values of those rows, [B, key heads, room, dim]; what is behind a row's length means nothing.
        """
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        stored_keys, stored_values = self._of(layer, keys, values)
        stored_keys[rows_B, :, lengths_B] = keys.transpose(0, 1)
        stored_values[rows_B, :, lengths_B] = values.transpose(0, 1)
        return stored_keys[: len(lengths_B)], stored_values[: len(lengths_B)]

    def write_states(self, layer: int, row: int, *states: Tensor) -> None:
        """Store the states of a recurrent layer behind a row's last token; every row's have the same shapes."""
        if layer not in self._states:
            self._states[layer] = tuple(state.new_zeros(self._rows, *state.shape) for state in states)
        for stored, new in zip(self._states[layer], states, strict=True):
            stored[row] = new

    def states(self, layer: int, rows: int) -> tuple[Tensor, ...]:
        """Those of the first `rows` rows, [rows, ...] each, to be changed in place."""
        return tuple(states[:rows] for states in self._states[layer])

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Make row `target` the same as row `source`, which has so many tokens."""
        for pair in self._layers.values():
            for states in pair:
                states[target, :, :num_tokens] = states[source, :, :num_tokens]
        for held in self._states.values():
            for states in held:
                states[target] = states[source]

    def _of(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            # Zeros: what is masked is multiplied by 0, and 0 * NaN would be NaN.
            self._layers[layer] = (
                keys.new_zeros(self._rows, keys.shape[0], self._tokens, keys.shape[2]),
                values.new_zeros(self._rows, values.shape[0], self._tokens, values.shape[2]),
            )
        return self._layers[layer]

    def _grown(self, states: Tensor) -> Tensor:
        rows, heads, tokens, dim = states.shape
        grown = states.new_zeros(self._rows, heads, self._tokens, dim)
        grown[:rows, :, :tokens] = states
        return grown


def _with_rows(states: Tensor, rows: int) -> Tensor:
    grown = states.new_zeros(rows, *states.shape[1:])
    grown[: len(states)] = states
    return grown


def _rounded(tokens: int) -> int:
    return -(-max(tokens, 1) // _ROOM) * _ROOM
