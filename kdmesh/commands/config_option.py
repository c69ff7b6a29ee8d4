"""What every command takes that is about a configuration: its file, and values laid over it."""

from __future__ import annotations

from pathlib import Path

import click

config_argument = click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=VALUE",
    help="Lay a value over the file's, as often as you like; VALUE is YAML.",
)
