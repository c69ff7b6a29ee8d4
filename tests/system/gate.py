"""Holds a job at a chosen place in a step, for as long as a test wants.

The place is a call of the divergence, so the job stands between a forward and a backward pass, with the teacher's
rows in its hands. Nothing is timed: the test is told when the job has come there, and says when it may go on.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from kdmesh.losses import build_divergence

_calls = count(1)


def divergence(
    log_q_CV: Tensor, log_p_CV: Tensor, *, gates: str, name: str = "forward_kl", params: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The built-in divergence `name`; call number n first passes the gate n of directory `gates`, if there is one.

    Only the job's first rank has gates.
    """
    gate = Path(gates) / str(next(_calls))
    if gate.is_dir() and os.environ.get("RANK", "0") == "0":
        with (gate / "go").open("rb") as go:  # first: whoever hears that it is reached may take the gate away
            (gate / "reached").write_bytes(b"!")
            go.read(1)
    return build_divergence(name, params)(log_q_CV, log_p_CV)


class Gate:
    """The test's side of one gate. It stops a job once: another start of the job passes."""

    def __init__(self, gates: Path, call: int) -> None:
        """
        Args:
            gates: directory that the job's divergence is told.
            call: number of the call, from 1, that waits.
        """
        self._path = gates / str(call)
        self._path.mkdir(parents=True)
        for name in ("reached", "go"):
            os.mkfifo(self._path / name)
        # Both ends of "go" are open here, so that neither side waits for the other to open it.
        self._reached = os.open(self._path / "reached", os.O_RDONLY | os.O_NONBLOCK)
        self._go = os.open(self._path / "go", os.O_RDWR)

    def is_reached(self) -> bool:
        """Whether the job has come to it."""
        return bool(select.select([self._reached], [], [], 0)[0])

    def let_go(self) -> None:
        """Let the job go on, and take the gate away."""
        os.write(self._go, b"!")
        self.remove()

    def remove(self) -> None:
        """Take the gate away; whoever stands there is dead or has been let go."""
        self._path.rename(self._path.with_name(f"{self._path.name}-passed"))
        os.close(self._reached)
