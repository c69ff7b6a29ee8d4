"""The command that makes the token ids of a run before it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from kdmesh.commands import check
from kdmesh.errors import ConfigError
from kdmesh.launch import jobs
from kdmesh_trainer.config import TrainerConfig


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Lay a value over the file's, as often as you like."
)
def tokenize(config: Path, overrides: tuple[str, ...]) -> None:
    """Make the files of token ids that the trainer in CONFIG maps, so that its start need not.

    They are made in `data.token_cache`, where later runs find them; what is there is checked. Needs neither a GPU nor
    a server. Ctrl-C leaves nothing half made.

    \b
    Example: kdmesh tokenize examples/train-blend.yaml --set data.token_cache.workers=16
    """
    loaded = check.load_any(config, overrides)
    if not isinstance(loaded, TrainerConfig):
        raise ConfigError(f"{config} is a {check.kind(loaded)} configuration; what is tokenised is a trainer's data")
    check.refuse_missing(loaded, source=config)
    argv = [sys.executable, "-m", "kdmesh_trainer.commands.tokenize", str(config), *jobs.set_arguments(overrides)]
    os.execv(argv[0], argv)
