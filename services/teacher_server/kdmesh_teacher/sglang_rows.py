"""Rows into shared memory, inside SGLang's scheduler process."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdmesh.sglang.segments import Segments
from kdmesh_teacher.sglang_ask import Ask


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

    def take(self, hidden_TD: Tensor) -> None:
        """Copy what is wanted of the next chunk's rows; returns when they are copied."""
        begin, end = self.position, self.position + len(hidden_TD)
        self.position = end
        first, last = np.searchsorted(self._ask.positions, (begin, end))
        out_RD = self._matrix(hidden_TD.shape[1])
        if first == last or out_RD is None:
            return  # a segment that is not mapped leaves the count short, which the server refuses
        wanted_R = self._ask.positions[first:last] - begin
        if wanted_R[-1] - wanted_R[0] == last - first - 1:
            selected_RD = hidden_TD[wanted_R[0] : wanted_R[-1] + 1]
        else:
            selected_RD = hidden_TD.index_select(0, torch.from_numpy(wanted_R.astype(np.int64)).to(hidden_TD.device))
        out_RD[first:last].copy_(selected_RD)
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
