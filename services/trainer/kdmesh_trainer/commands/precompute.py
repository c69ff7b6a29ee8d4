"""The command line of `kdmesh precompute`: python -m kdmesh_trainer.commands.precompute."""

from __future__ import annotations

import argparse
import logging
import sys

from kdmesh.interrupt import quiet_interrupt

with quiet_interrupt():
    from kdmesh import log
    from kdmesh.config import config_parser
    from kdmesh.counting import counted
    from kdmesh.outputs import say
    from kdmesh_trainer.commands.running import run
    from kdmesh_trainer.config import TrainerConfig

logger = logging.getLogger("kdmesh_trainer.precompute")

_INCOMPLETE = 1


def main() -> int:
    """Returns 0 when everything is kept, 1 when the cache did not keep all of it; else see `run`."""
    stopped = "Stopped; what was computed is kept, and the same command goes on from there."
    return run(_parser(), _precompute, when_stopped=stopped)


def _precompute(cfg: TrainerConfig, arguments: argparse.Namespace) -> int:
    log.configure("precompute")
    from kdmesh_trainer.precompute import precompute  # not at the top: a bad configuration must not wait for torch

    with counted("tokens", elsewhere=_log_progress) as show:
        kept, wanted = precompute(cfg, is_partial=arguments.partial, tell=_tell, show=show)
    _tell(f"{kept:,} of {wanted:,} sequences are kept")
    return 0 if kept == wanted else _INCOMPLETE


def _parser() -> argparse.ArgumentParser:
    parser = config_parser("kdmesh_trainer.commands.precompute", "Have the teachers of a run keep its rows.")
    parser.add_argument("--partial", action="store_true", help="keep what fits, where not all does")
    return parser


def _tell(sentence: str) -> None:
    say(f"{sentence}\n")


def _log_progress(done: int, total: int, left_s: float | None) -> None:
    eta_s = None if left_s is None else round(left_s, 1)
    logger.info("progress", extra={"tokens": done, "of_tokens": total, "eta_s": eta_s})


if __name__ == "__main__":
    sys.exit(main())
