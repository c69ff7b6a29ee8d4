"""A trainer's side as a process of its own: for each line "N SEED" on stdin it asks for N rows, and says what came.

`python -m tests.support.far_client DOOR WIRE DEADLINE_S HIDDEN_SIZE ADDRESS...`; a line of JSON answers each line.
ACCESS_VARIABLE says how it gets in, as the JSON of an AccessConfig.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from torch import Tensor

from kdmesh.allocator import keep_freed_memory
from kdmesh.auth.config import AccessConfig
from kdmesh.errors import KdmeshError
from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.teacher_requests import expected_rows, sequence

ACCESS_VARIABLE = "FAR_CLIENT_ACCESS"


def main() -> None:
    """Until stdin ends."""
    keep_freed_memory()
    door, wire, deadline_s, hidden_size, *addresses = sys.argv[1:]
    access = AccessConfig.model_validate_json(os.environ.get(ACCESS_VARIABLE, "{}"))
    with TeacherPool(
        addresses,
        job="far",
        door=door,  # type: ignore[arg-type]
        wire=wire,  # type: ignore[arg-type]
        deadline_s=float(deadline_s),
        access=access,
    ) as pool:
        _say({"doors": dict(pool.stats().doors)})
        for line in sys.stdin:
            num_rows, seed = map(int, line.split())
            asked = [sequence(num_rows + 1, seed=seed)]
            began_s = time.monotonic()
            try:
                rows_RD = pool.submit(asked).wait().rows_RD
            except KdmeshError as error:
                came = {"error": f"{type(error).__name__}: {error}"}
            else:
                came = {"is_right": _is_right(rows_RD, expected_rows(asked, int(hidden_size)), wire)}
            _say({**came, "seconds": time.monotonic() - began_s, "retries": pool.stats().retries})


def _is_right(rows_RD: Tensor, expected_RD: Tensor, wire: str) -> bool:
    if wire == "exact":
        return torch.equal(rows_RD, expected_RD)
    bound_RD = expected_RD.abs() / 15.9 + expected_RD.abs().amax(dim=1, keepdim=True) / 440_000
    return bool(((rows_RD - expected_RD).abs() <= bound_RD).all())


def _say(fields: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
