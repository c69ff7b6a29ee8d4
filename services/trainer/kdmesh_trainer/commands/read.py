"""The command line that reads a run's data without its servers: python -m kdmesh_trainer.commands.read."""

from __future__ import annotations

import argparse
import sys

from kdmesh.interrupt import quiet_interrupt

with quiet_interrupt():
    from kdmesh import log
    from kdmesh.config import config_parser
    from kdmesh_trainer.commands.running import run
    from kdmesh_trainer.config import TrainerConfig


def main() -> int:
    """Returns 0 when all can be used; else see `run`."""
    what = "Read what a run is trained on and judged by, as it would."
    return run(config_parser("kdmesh_trainer.commands.read", what), _read)


def _read(cfg: TrainerConfig, _: argparse.Namespace) -> int:
    log.configure("trainer")
    from kdmesh_trainer.builders.checked import check  # not at the top: a bad configuration must not wait for torch
    from kdmesh_trainer.builders.data import read_alone, read_held_out

    checked = check(cfg)
    read_alone(cfg, checked.train)
    read_held_out(cfg, checked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
