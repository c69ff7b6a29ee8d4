"""Addresses of Unix sockets, which may be no longer than 107 bytes, for paths that may."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_LONGEST = 107  # Linux, unix(7): sun_path less the zero at its end


@contextlib.contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """What to bind or connect to inside the context, in order to do so at `path`.

    Raises:
        OSError: the directory cannot be opened.
    """
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
