"""Rows as float8 e4m3 with a scale for each, for networks that are thinner than the teacher is fast.

Every element x comes back off by at most |x| / 16 + m / 450000, m being the largest magnitude of its row, and then
rounded to the row's own type. A row that is not finite comes back as NaN throughout. The same row always comes
back as the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.groups.octets import octets
from kdmesh.types import DType

_LARGEST = 448.0  # of e4m3
_SMALLEST_SCALE = 2.0**-126
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # of every code
_ELEMENTS_AT_ONCE = 2**14
SCALE_BYTES = 4
"""A float32, little-endian."""


def rows_of(chunk_bytes: int, cols: int) -> int:
    """How many rows fit in a chunk; at least one."""
    return max(1, chunk_bytes // (cols + SCALE_BYTES))


def encode(rows: memoryview, *, cols: int, dtype: DType) -> bytes:
    """Whole rows as their scales, and then their elements."""
    rows_RD = octets(rows).view(getattr(torch, dtype.value)).view(-1, cols)
    parts = [_encoded(part_RD.float()) for part_RD in torch.split(rows_RD, _rows_at_once(cols))]
    return b"".join([scale_R.numpy().data for scale_R, _ in parts] + [codes_RD.numpy().data for _, codes_RD in parts])


def decode(chunk: memoryview, out_RD: Tensor) -> int:
    """Write the rows that a chunk holds to the first of `out_RD`; returns how many.

    Raises:
        EngineFailure: it does not hold whole rows, or more than there is room for.
    """
    room, cols = out_RD.shape
    num_rows, left = divmod(len(chunk), cols + SCALE_BYTES)
    if left or not 0 < num_rows <= room:
        raise EngineFailure(f"a chunk of {len(chunk)} bytes holds no whole rows of {cols}, or more than {room} of them")
    scales, codes = chunk[: num_rows * SCALE_BYTES], chunk[num_rows * SCALE_BYTES :]
    scale_R = octets(scales).clone().view(torch.float32)
    codes_RD, at_once = octets(codes).view(num_rows, cols), _rows_at_once(cols)
    for begin in range(0, num_rows, at_once):
        part = slice(begin, min(begin + at_once, num_rows))
        # A look-up, because torch's own conversion takes five times as long.
        rows_RD = torch.index_select(_VALUES, 0, codes_RD[part].reshape(-1).int()).view(-1, cols)
        out_RD[part] = rows_RD.mul_(scale_R[part].unsqueeze(1))
    return num_rows


def _encoded(rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """[R] float32 scales, and [R, D] octets."""
    largest_R = rows_RD.abs().amax(dim=1)
    scale_R = (largest_R / _LARGEST).clamp(min=_SMALLEST_SCALE).masked_fill(~largest_R.isfinite(), torch.nan)
    return scale_R, (rows_RD / scale_R.unsqueeze(1)).to(torch.float8_e4m3fn).view(torch.uint8)


def _rows_at_once(cols: int) -> int:
    """So few that torch takes no second thread, for which it would wait where cores are busy."""
    return max(1, _ELEMENTS_AT_ONCE // cols)
