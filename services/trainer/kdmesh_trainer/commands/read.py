"""The command line that reads a run's data without its servers: python -m kdmesh_trainer.commands.read."""

from __future__ import annotations

import argparse
import sys

from kdmesh.interrupt import INTERRUPTED, quiet_interrupt

with quiet_interrupt():
    from kdmesh import log
    from kdmesh.config import config_parser, load
    from kdmesh.errors import KdmeshError
    from kdmesh_trainer.config import TrainerConfig

_REFUSED = 2


def main() -> int:
    """Parse, check, read. Returns 0 when all can be used, 2 when something was refused, 130 when it was interrupted."""
    arguments = _parser().parse_args()
    try:
        cfg = load(TrainerConfig, arguments.config, arguments.set)
        log.configure("trainer")
        _read(cfg)
    except KdmeshError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    return config_parser("kdmesh_trainer.commands.read", "Read what a run is trained on and judged by, as it would.")


def _read(cfg: TrainerConfig) -> None:
    from kdmesh_trainer.build import check  # not at the top: a bad configuration must not wait for torch
    from kdmesh_trainer.builders.data import read_alone, read_held_out

    checked = check(cfg)
    read_alone(cfg, checked.train)
    read_held_out(cfg, checked)


if __name__ == "__main__":
    sys.exit(main())
