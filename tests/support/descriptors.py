"""What a part of a test leaves open in this process."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_WITHIN_S = 5.0


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """No descriptor that the block opened is open soon after it.

    What was open before may close meanwhile, and threads of earlier tests may open and close theirs.
    """
    gc.collect()  # what failed tests left in cycles
    before = _open_descriptors()
    yield
    end = time.monotonic() + _WITHIN_S
    while left := _open_descriptors() - before:
        assert time.monotonic() < end, f"left open: {sorted(left)}"
        time.sleep(0.01)


def _open_descriptors() -> set[tuple[int, str]]:
    """Each with what it leads to, as another may get a closed one's number."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed since, as the one that listed them is
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found
