"""The command line of `kdmesh tokenize`: python -m kdmesh_trainer.commands.tokenize."""

from __future__ import annotations

import argparse
import sys

from kdmesh.interrupt import INTERRUPTED, quiet_interrupt

with quiet_interrupt():
    from kdmesh import log
    from kdmesh.config import config_parser, load
    from kdmesh.errors import ConfigError, KdmeshError
    from kdmesh_trainer.config import TrainerConfig

_REFUSED = 2


def main() -> int:
    """Parse, check, make what is missing.

    Returns:
        The exit status: 0 when everything is there, 2 when something was refused, 130 when it was interrupted.
    """
    arguments = _parser().parse_args()
    try:
        cfg = load(TrainerConfig, arguments.config, arguments.set)
        log.configure("tokenize")
        _make(cfg)
    except KdmeshError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; datasets that were complete are kept.\n")
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    return config_parser("kdmesh_trainer.commands.tokenize", "Make the files of token ids that a run maps.")


def _make(cfg: TrainerConfig) -> None:
    if cfg.data.token_cache is None:
        raise ConfigError("there is no data.token_cache, so the trainer keeps token ids in memory")
    from kdmesh_trainer.build import check  # not at the top: a bad configuration must not wait for torch
    from kdmesh_trainer.builders.data import read_alone

    read_alone(cfg, check(cfg).train)


if __name__ == "__main__":
    sys.exit(main())
