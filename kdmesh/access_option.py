"""The options of commands that call servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdmesh import config
from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh_trainer.replicas_config import checked_address


class _Address(click.ParamType):  # type: ignore[type-arg]  # generic in new versions alone
    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return checked_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


ADDRESS = _Address()
"""Where a server is, or several behind a name, as in the configuration of a trainer."""

access_option = click.option(
    "--access",
    "access_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file with token_file and tls, like `teacher.access` of a trainer, for a server that asks who calls.",
)


def read_access(path: Path | None) -> AccessConfig:
    """What the file says; no file: the server asks nobody. Raises ConfigError."""
    return OPEN_ACCESS if path is None else config.load(AccessConfig, path)
