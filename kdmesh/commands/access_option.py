"""The options of commands that call servers."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import click

from kdmesh import config
from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh_trainer.sections.replicas_config import checked_address

Addresses = TypeVar("Addresses", str, tuple[str, ...])


def checked_addresses(context: click.Context, parameter: click.Parameter, value: Addresses) -> Addresses:
    """A callback of options that say where servers are, in the forms that a trainer's configuration takes."""
    for address in (value,) if isinstance(value, str) else value:
        try:
            checked_address(address)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


access_option = click.option(
    "--access",
    "access_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file with token_file and tls, like `teacher.access` of a trainer, for a server that asks who calls.",
)


def read_access(path: Path | None) -> AccessConfig:
    """What the file says; no file: the server asks nobody. Raises ConfigError."""
    return OPEN_ACCESS if path is None else config.load(AccessConfig, path)
