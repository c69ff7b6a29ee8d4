"""A model that a person names on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdmesh.hub import PREFIX, local_path


class ModelDirectory(click.Path):
    """A model's directory, or `hf://OWNER/MODEL`, which is fetched."""

    def __init__(self, *, with_weights: bool) -> None:
        """Of the hub's, weights come where something is computed with them; a tokenizer needs none."""
        super().__init__(path_type=Path, file_okay=False)
        self._with_weights = with_weights

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Raises ConfigError where it cannot be fetched."""
        if isinstance(value, str) and value.startswith(PREFIX):
            value = str(local_path(value, with_weights=self._with_weights))
        return super().convert(value, param, ctx)
