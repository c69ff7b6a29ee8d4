"""The option of commands that call a server which asks who calls."""

from __future__ import annotations

from pathlib import Path

import click

from kdmesh import config
from kdmesh.auth.config import OPEN_ACCESS, AccessConfig

access_option = click.option(
    "--access",
    "access_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file with token_file and tls, like `teacher.access` of a trainer, for a server that asks who calls.",
)


def read_access(path: Path | None) -> AccessConfig:
    """What the file says; no file: the server asks nobody. Raises ConfigError."""
    return OPEN_ACCESS if path is None else config.load(AccessConfig, path)
