"""Runs of trainer_runs that are killed on several ranks, and go on."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.trainer_ranks import finish, run_ranks, start_ranks_of

_RUNS = "tests.support.trainer_runs"


def check_exact_continuation(
    arguments: Mapping[str, Any], other: Path, *, ranks: int = 2, within_s: float = 100
) -> None:
    """Kill a run in step 5 and let it go on from its checkpoint of step 3: it has the losses of one that was not.

    Args:
        arguments: of trainer_runs.train.
        other: where the uninterrupted run writes.
        within_s: for each of both halves.
    """
    killed = finish(start_ranks_of(f"{_RUNS}:train", ranks=ranks, **arguments, save_at=3, kill_at=5), within_s=within_s)
    assert [outcome.exit_code for outcome in killed] == [-signal.SIGKILL] * ranks
    both = run_ranks(f"{_RUNS}:train_rest_and_whole", ranks=ranks, within_s=within_s, **arguments, other=str(other))[0]
    assert both["first"] == 3
    assert both["rest"] == both["whole"][3:]
