"""Rows into shared memory, inside SGLang's scheduler process."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from kdmesh.sglang.segments import Segments
from kdmesh.types import Int32Array
from kdmesh_teacher.sglang.ask import Ask

NO_OUTPUTS: Mapping[int, Tensor] = MappingProxyType({})
"""Of layers, by number."""


class RowProgress:
    """How far the rows of one sequence have come.

    Attributes:
        position: tokens that are computed, or were in the cache.
        num_written: rows that are in the segment.
    """

    def __init__(self, ask: Ask, segments: Segments, *, position: int) -> None:
        self._ask = ask
        self._segments = segments
        self.position = position
        self.num_written = 0

    def take(self, hidden_TD: Tensor, outputs: Mapping[int, Tensor] = NO_OUTPUTS) -> None:
        """Copy what is wanted of the next chunk's rows; returns when they are copied.

        Args:
            hidden_TD: the final hidden states of the chunk.
            outputs: by layer, [T, D] what it gave the chunk.
        """
        begin, end = self.position, self.position + len(hidden_TD)
        self.position = end
        first, last = np.searchsorted(self._ask.positions, (begin, end))
        parts = [hidden_TD, *(outputs[layer] for layer in self._ask.layers if layer in outputs)]
        out_RC = self._matrix(hidden_TD.shape[1] * (1 + len(self._ask.layers)))
        if first == last or out_RC is None or len(parts) != 1 + len(self._ask.layers):
            return  # a segment that is not mapped, or a layer that is not known, leaves the count short: it is refused
        selected = [_selected(part_TD, self._ask.positions[first:last] - begin) for part_TD in parts]
        # Side by side already on the device: columns are copied one by one from there.
        out_RC[first:last].copy_(selected[0] if len(selected) == 1 else torch.cat(selected, 1))
        self.num_written += int(last - first)

    def _matrix(self, columns: int) -> Tensor | None:
        """[R, columns] the memory that the rows go to; None when it is not mapped."""
        ask = self._ask
        mapping = self._segments.mapping(ask.segment)
        if mapping is None:
            return None
        rows, dtype = len(ask.positions), getattr(torch, ask.dtype.value)
        flat = torch.frombuffer(mapping, dtype=dtype, count=rows * columns, offset=ask.offset_bytes)
        return flat.view(rows, columns)


def _selected(hidden_TD: Tensor, wanted_R: Int32Array) -> Tensor:
    """[R, D] these rows; a view where they follow each other."""
    if wanted_R[-1] - wanted_R[0] == len(wanted_R) - 1:
        return hidden_TD[wanted_R[0] : wanted_R[-1] + 1]
    return hidden_TD.index_select(0, torch.from_numpy(wanted_R.astype(np.int64)).to(hidden_TD.device))
