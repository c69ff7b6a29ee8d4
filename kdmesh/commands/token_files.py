"""The command that makes the token ids of a run before it."""

from __future__ import annotations

from pathlib import Path

import click

from kdmesh.commands.config_option import config_argument, set_option
from kdmesh.launch.program import become
from kdmesh.preflight import check
from kdmesh_trainer.config import TrainerConfig


@click.command()
@config_argument
@set_option
def tokenize(config: Path, overrides: tuple[str, ...]) -> None:
    """Make the files of token ids that the trainer in CONFIG maps, so that its start need not.

    They are made in `data.token_cache`, where later runs find them; what is there is checked. Needs neither a GPU nor
    a server. Ctrl-C leaves nothing half made.

    \b
    Example: kdmesh tokenize examples/train-blend.yaml --set data.token_cache.workers=16
    """
    cfg = check.load_as(TrainerConfig, config, overrides)
    check.refuse_missing(cfg, source=config, looks=check.missing_to_read)
    become("kdmesh_trainer.commands.tokenize", config, overrides)
