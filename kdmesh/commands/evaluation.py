"""The command that asks a served model the questions of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from kdmesh.config import read_tree
from kdmesh.errors import ConfigError
from kdmesh.launch import jobs

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("config", type=_FILE)
@click.option("--rollout", "rollouts", multiple=True, metavar="HOST:PORT", help="A rollout server, not the file's.")
@click.option("--output", type=_FILE, help="JSONL to write: what was answered to each question.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --output, if it is there.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Lay a value over the file's.")
def evaluate(
    config: Path, rollouts: tuple[str, ...], output: Path | None, overwrite: bool, overrides: tuple[str, ...]
) -> None:
    """Ask a served model the `evaluation.questions` of the trainer in CONFIG, and grade its answers.

    As the run itself asks them, but of the weights that the rollout servers have: any model with the tokenizer of
    `student.model` can be compared. Nothing is trained, and no weights are sent. The last line of stdout is JSON.

    \b
    Example: kdmesh evaluate examples/train-evaluate.yaml --rollout 127.0.0.1:50061
    """
    asked = read_tree(config, overrides).get("evaluation") or {}
    if isinstance(asked, dict) and asked.get("questions") is None:
        raise ConfigError(f"{config}: evaluation.questions is not set, so there is nothing to ask")
    if rollouts:
        key = jobs.rollout_to_serve(config, overrides).addresses
        overrides = (*overrides, f"{key}={list(rollouts)}")
    argv = [sys.executable, "-m", "kdmesh_trainer.commands.evaluate", str(config), *jobs.set_arguments(overrides)]
    if overwrite:
        argv += ["--overwrite"]
    if output is not None:
        argv += ["--output", str(output)]
    os.execv(argv[0], argv)
