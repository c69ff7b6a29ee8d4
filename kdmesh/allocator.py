"""Tells the C library's allocator what to do with the memory that tensors on a CPU give back."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MOST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_TOP_PAD = 64 * 2**20


def keep_freed_memory(most_bytes: int = 2**31 - 1) -> None:
    """Let this process use its freed memory again instead of returning it to the kernel.

    A training step allocates and frees the same activations over and over. As it is set by default, glibc maps
    and unmaps each of them, and the kernel zeroes every page anew: a fifth of the time of a small model's step
    (docs/performance.md). So are messages of a MiB, each of which is copied a few times. The process's size stays at
    its peak instead, or `most_bytes` above what it uses. Larger blocks than 32 MiB come and go as before. Does nothing
    where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, most_bytes)
    mallopt(_M_TOP_PAD, _TOP_PAD)


def return_freed_memory() -> None:
    """Give what this process has freed back to the kernel. Does nothing where the C library is another than glibc."""
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    malloc_trim(0)
