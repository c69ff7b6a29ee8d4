"""The command that says what memory a run will need."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kdmesh.commands.config_option import config_argument, set_option
from kdmesh.errors import ConfigError
from kdmesh.launch import jobs
from kdmesh.launch.program import become
from kdmesh.preflight import check
from kdmesh.preflight.teacher_fit import refuse_unknown_layers
from kdmesh_teacher.config import FakeEngine, TeacherConfig
from kdmesh_trainer.config import TrainerConfig

_MIB = 2**20


@click.command()
@config_argument
@set_option
@click.option(
    "--serve",
    "teacher_configs",
    multiple=True,
    metavar="[NAME=]TEACHER.YAML",
    help="Configuration of a teacher's server, whose head and slab are then counted.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Plan for this device.  [default: this machine's]")
@click.option("--ranks", type=click.IntRange(min=1), help="Plan for so many ranks.  [default: the file's]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def plan(
    config: Path,
    overrides: tuple[str, ...],
    teacher_configs: tuple[str, ...],
    device: str | None,
    ranks: int | None,
    as_json: bool,
) -> None:
    """Say what memory each rank of the trainer in CONFIG will need, before any of it is taken.

    Runs two steps of the largest micro-batch that the file allows, the trainer's own code on tensors without memory.

    \b
    Example: kdmesh plan examples/train.yaml --serve examples/teacher.yaml
    """
    trainer = check.load_as(TrainerConfig, config, overrides, fetch=False)
    check.refuse_missing(trainer, source=config, looks=check.missing_to_plan)
    servers = []
    for text in teacher_configs:
        name, file = jobs.named_file(text)
        teacher = check.load_any(file)
        if not isinstance(teacher, TeacherConfig) or isinstance(teacher.engine, FakeEngine):
            raise ConfigError(f"--serve {text}: {file} does not configure a teacher with a model")
        check.refuse_missing(teacher, source=file, looks=check.missing_to_plan)
        refuse_unknown_layers(trainer, teacher)
        servers.append(
            {
                "name": name,
                "model": str(teacher.engine.model),
                "dtype": teacher.engine.dtype,
                "slab_bytes": round(teacher.slab.slots * teacher.slab.slot_mib * _MIB),
            }
        )
    flags = ["--teachers", json.dumps(servers)]
    if device is not None:
        flags += ["--device", device]
    if ranks is not None:
        flags += ["--ranks", str(ranks)]
    if as_json:
        flags += ["--json"]
    become("kdmesh_trainer.commands.plan", config, overrides, *flags)
