"""One sequence's rows in a file: a header with their key, size and digest, then the rows."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from kdmesh.weights import digests

_HEADER = struct.Struct("<8s32sQ16s")  # magic, key, bytes of the rows, their XXH3-128
_MAGIC = b"kdrows\x00\x01"
_BLOCK_BYTES = 4096  # of most file systems

HEADER_BYTES = _HEADER.size
"""Of a file that are not rows."""

MAX_OVERHEAD_BYTES = HEADER_BYTES + _BLOCK_BYTES
"""Most bytes that a file takes beyond its rows."""

UNFINISHED = ".part"
"""How the name of a file ends that is being written."""


class BadEntry(Exception):
    """A file that is not what its name says, with the reason."""


def size_on_disk(rows_bytes: int) -> int:
    """Bytes that a file with so many bytes of rows takes."""
    return -(-(HEADER_BYTES + rows_bytes) // _BLOCK_BYTES) * _BLOCK_BYTES


def write(path: Path, key: bytes, rows: memoryview, digest: bytes) -> None:
    """Whoever finds the file finds all of it, unless the machine lost its power. Blocks; raises OSError.

    It is not waited for the disk: a file that a power cut damaged is found out by its digest.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb", buffering=0, opener=_private) as file:
            _write_all(file.fileno(), _HEADER.pack(_MAGIC, key, len(rows), digest))
            _write_all(file.fileno(), rows)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read(path: Path, key: bytes, out: memoryview) -> None:
    """Fill `out` with the rows. Blocks.

    Raises:
        BadEntry: it holds other rows, or not so many; `out` may have been written.
        FileNotFoundError: there is no such file.
        OSError: it cannot be read now, which says nothing of what it holds; `out` may have been written.
    """
    with path.open("rb", buffering=0) as file:
        header = file.read(HEADER_BYTES)
        if len(header) != HEADER_BYTES:
            raise BadEntry(f"a header of {len(header)} bytes")
        magic, named, size_bytes, digest = _HEADER.unpack(header)
        if (magic, named, size_bytes) != (_MAGIC, key, len(out)):
            raise BadEntry(f"a header for other rows: {size_bytes} bytes, where {len(out)} are wanted")
        _read_all(file.fileno(), out)
        if file.read(1):
            raise BadEntry("more bytes than the header says")
    if digests.digest(out) != digest:
        raise BadEntry("rows with another digest")


def _private(path: str, flags: int) -> int:
    """For this user alone: rows tell much of what was asked."""
    return os.open(path, flags, 0o600)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_all(descriptor: int, out: memoryview) -> None:
    while out:
        count = os.readv(descriptor, [out])
        if not count:
            raise BadEntry(f"{len(out)} bytes are missing")
        out = out[count:]
