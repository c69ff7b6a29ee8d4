"""The command line of `kdmesh tokenize`: python -m kdmesh_trainer.commands.tokenize."""

from __future__ import annotations

import argparse
import sys

from kdmesh.interrupt import quiet_interrupt

with quiet_interrupt():
    from kdmesh import log
    from kdmesh.config import config_parser
    from kdmesh.errors import ConfigError
    from kdmesh_trainer.commands.running import run
    from kdmesh_trainer.config import TrainerConfig


def main() -> int:
    """Make what is missing. Returns 0 when everything is there; else see `run`."""
    parser = config_parser("kdmesh_trainer.commands.tokenize", "Make the files of token ids that a run maps.")
    return run(parser, _make, when_stopped="Stopped; datasets that were complete are kept.")


def _make(cfg: TrainerConfig, _: argparse.Namespace) -> int:
    log.configure("tokenize")
    if cfg.data.token_cache is None:
        raise ConfigError("there is no data.token_cache, so the trainer keeps token ids in memory")
    from kdmesh_trainer.builders.checked import check  # not at the top: a bad configuration must not wait for torch
    from kdmesh_trainer.builders.data import read_alone

    read_alone(cfg, check(cfg).train)
    return 0


if __name__ == "__main__":
    sys.exit(main())
