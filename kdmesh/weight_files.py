"""Looks at what safetensors files begin with: whether they are whole, and which tensors lie in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_POINTER = b"version https://git-lfs"


def weight_problem(file: Path) -> str | None:
    """Why it is not a whole safetensors file; None when it is."""
    with file.open("rb") as stream:
        begin = stream.read(len(_POINTER))
    if begin == _POINTER:
        return "is a git-lfs pointer, not a safetensors file: run `git lfs pull`"
    table = weight_table(file)
    if table is None:
        return "is not a safetensors file, or one that is cut short in its table"
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in table.items() if name != "__metadata__"]
    except (KeyError, TypeError, IndexError, ValueError):
        return "is not a safetensors file: its table does not say where tensors lie"
    whole, there = 8 + int.from_bytes(begin[:8], "little") + max(ends, default=0), file.stat().st_size
    return f"is cut short: it has {there} of {whole} bytes" if there < whole and ends else None


def weight_table(file: Path) -> dict[str, Any] | None:
    """What a safetensors file begins with: its size in bytes, then the table itself; None when it does not."""
    with file.open("rb") as stream:
        size_bytes = int.from_bytes(stream.read(8), "little")
        if size_bytes > file.stat().st_size:
            return None
        try:
            table = json.loads(stream.read(size_bytes))
        except ValueError:
            return None
    return table if isinstance(table, dict) else None
