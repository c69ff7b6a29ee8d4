"""Rows into shared memory, inside SGLang's scheduler process."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from kdmesh.handles.memory import prefault
from kdmesh.types import DType
from kdmesh_teacher.sglang_messages import RECEIVE_BYTES, Adopt, Adopted, Ask, Drop, Hello, pack, unpack

_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}


class Segments:
    """The server's memory, as far as this process has it mapped."""

    def __init__(self) -> None:
        self._mappings: dict[int, mmap.mmap] = {}

    def follow(self, server: socket.socket) -> None:
        """Do what the server says, in a thread, until it hangs up."""
        threading.Thread(target=self._follow, args=(server,), name="kdmesh-segments", daemon=True).start()

    def matrix(self, ask: Ask, columns: int) -> Tensor | None:
        """[R, columns] the memory that the rows go to; None when it is not mapped."""
        mapping = self._mappings.get(ask.segment)
        if mapping is None:
            return None
        rows = len(ask.positions)
        flat = torch.frombuffer(mapping, dtype=_DTYPES[ask.dtype], count=rows * columns, offset=ask.offset_bytes)
        return flat.view(rows, columns)

    def _follow(self, server: socket.socket) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(server, RECEIVE_BYTES, 1)
            if not data:
                return
            match unpack(data):
                case Adopt(number=number, size_bytes=size_bytes):
                    (descriptor,) = descriptors
                    self._map(number, descriptor, size_bytes)
                    server.send(pack(Adopted(number=number)))
                case Drop(number=number):
                    # The mapping goes with the last tensor that was made of it.
                    self._mappings.pop(number, None)
                case Hello() | Adopted() as other:
                    raise AssertionError(f"the server sends no {other}")
                case unreachable:
                    assert_never(unreachable)

    def _map(self, number: int, descriptor: int, size_bytes: int) -> None:
        try:
            mapping = mmap.mmap(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        prefault(mapping)
        self._mappings[number] = mapping


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
        out_RD = self._segments.matrix(self._ask, hidden_TD.shape[1])
        if first == last or out_RD is None:
            return  # a segment that is not mapped leaves the count short, which the server refuses
        wanted_R = self._ask.positions[first:last] - begin
        if wanted_R[-1] - wanted_R[0] == last - first - 1:
            selected_RD = hidden_TD[wanted_R[0] : wanted_R[-1] + 1]
        else:
            selected_RD = hidden_TD.index_select(0, torch.from_numpy(wanted_R.astype(np.int64)).to(hidden_TD.device))
        out_RD[first:last].copy_(selected_RD)
        self.num_written += int(last - first)
