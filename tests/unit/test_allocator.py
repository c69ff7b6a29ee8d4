"""Freed memory stays with the process that asked for that."""

from __future__ import annotations

import subprocess
import sys

# 16 MiB, touched and freed again and again: prints how many pages the kernel had to give.
CHURN = """
import ctypes, resource, sys
from kdmesh.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    blocks = [libc.malloc(16 * 2**20) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, 16 * 2**20)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CHURN, mode], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def test_freed_memory_is_used_again_without_the_kernel() -> None:
    pages_of_one_round = 3 * 16 * 2**20 // 4096
    assert _faults("keep") < 2 * pages_of_one_round
    assert _faults("default") > 4 * pages_of_one_round
