"""The command that asks a served model the questions of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdmesh.commands.access_option import access_option, read_access
from kdmesh.commands.config_option import config_argument, set_option
from kdmesh.commands.endpoint_options import (
    endpoint_arguments,
    endpoint_options,
    read_endpoint,
    refuse_others_options,
)
from kdmesh.config import read_tree
from kdmesh.errors import ConfigError
from kdmesh.launch import jobs
from kdmesh.launch.program import become


@click.command()
@config_argument
@click.option("--rollout", "rollouts", multiple=True, metavar="HOST:PORT", help="A rollout server, not the file's.")
@endpoint_options
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSONL to write: what was answered to each question.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file of --output, if it is there.")
@set_option
@access_option
@click.pass_context
def evaluate(context: click.Context, /, config: Path, **options: Any) -> None:
    """Ask a served model the `evaluation.questions` of the trainer in CONFIG, and grade its answers.

    As the run itself asks them, but of the weights that the rollout servers have: any model with the tokenizer of
    `student.model` can be compared. With --openai any model at all, by text and its server's own chat template.
    Nothing is trained, and no weights are sent. The last line of stdout is JSON.

    \b
    Example: kdmesh evaluate examples/train-evaluate.yaml --rollout 127.0.0.1:50061
    Example: kdmesh evaluate examples/train-evaluate.yaml --openai https://HOST/v1 --model-name NAME
    """
    refuse_others_options(context, asks_openai=bool(options["urls"]), others=("rollouts",))
    if options["urls"]:
        read_endpoint(options, read_access(options["access_file"]))  # what it refuses, it refuses before torch loads
    elif options["access_file"] is not None:
        raise ConfigError("--access goes only with --openai; for rollout servers, set `access` beside their addresses")
    rollouts, overrides = options["rollouts"], options["overrides"]
    asked = read_tree(config, overrides).get("evaluation") or {}
    if isinstance(asked, dict) and asked.get("questions") is None:
        raise ConfigError(f"{config}: evaluation.questions is not set, so there is nothing to ask")
    if rollouts:
        key = jobs.rollout_to_serve(config, overrides).addresses
        overrides = (*overrides, f"{key}={list(rollouts)}")
    flags = endpoint_arguments(options) if options["urls"] else []
    if options["overwrite"]:
        flags += ["--overwrite"]
    if options["output"] is not None:
        flags += ["--output", str(options["output"])]
    become("kdmesh_trainer.commands.evaluate", config, overrides, *flags)
