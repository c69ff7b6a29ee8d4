"""A job that asks for rows and lets go of none: python -m tests.chaos.hog ADDRESS."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from kdmesh.errors import RpcError
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence

_TOKENS = 40


def main() -> None:
    """Say how many it holds whenever that is one more, for ever."""
    held: list[Any] = []
    ids = np.arange(_TOKENS, dtype=np.int32)
    with TeacherPool((sys.argv[1],), job="hog", door="shm", deadline_s=2.0) as pool:
        while True:
            positions = np.array([len(held) % (_TOKENS - 1)], dtype=np.int32)
            try:
                held.append(pool.submit([TokenSequence(token_ids=ids, positions=positions)]).wait())
            except RpcError:
                continue  # it has all that it may have
            sys.stdout.write(f"{len(held)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
