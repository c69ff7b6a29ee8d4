"""Runs one training job on this machine: its ranks, with a teacher of their own when asked to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from kdmesh import check, config, local
from kdmesh.errors import ConfigError
from kdmesh.log import is_urgent
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import Distill, TrainerConfig

# Loading a large model takes minutes; a teacher that cannot says so at once by exiting.
_TEACHER_READY_S = 1800.0
# Beyond the requests it may finish, the time that unloading takes.
_TEACHER_GRACE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """CPU threads for each process of a job."""

    teacher: int
    rank: int


def train(path: Path, overrides: Sequence[str], teacher_path: Path | None) -> None:
    """Check everything, start the teacher if any, then the ranks, and wait for them.

    A signal ends the run after the current step; that is a success when every rank saved and left.

    Raises:
        ConfigError: a configuration is bad, or names something that is not there.
        ChildFailed: a process ended that should not have.
        Stopped: a signal came, and a rank could not end cleanly.
    """
    teacher = None if teacher_path is None else _checked_teacher(teacher_path)
    cfg = _checked_trainer(path, [*overrides, *served("later:0")] if teacher else overrides)
    threads = split_threads(cfg, with_teacher=teacher is not None)
    ranks: list[local.Child] = []
    try:
        with ExitStack() as stack:
            if teacher is None or teacher_path is None:
                processes = stack.enter_context(local.Processes())
            else:
                cfg.output.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context((cfg.output / "teacher.log").open("a", buffering=1, encoding="utf-8"))
                processes = stack.enter_context(local.Processes())
                command = teacher_command(
                    teacher_path, teacher, threads=threads.teacher, on_line=kept(log.write, show=_echo)
                )
                overrides = [*overrides, *served(serve_teacher(processes, command))]
            ranks = processes.start(*rank_commands(path, overrides, ranks=num_ranks(cfg), threads=threads.rank))
            _wait(processes, ranks)
    except local.Stopped:
        if not ranks or any(rank.exit_code != 0 for rank in ranks):
            raise
        click.echo(f"Stopped, with a checkpoint in {cfg.output}; the same command continues.", err=True)


def _wait(processes: local.Processes, ranks: Sequence[local.Child]) -> None:
    try:
        processes.wait(ranks)
    except local.Stopped:
        _echo("Stopping after this step, with a checkpoint; once more ends at once.")
        raise


def num_ranks(cfg: TrainerConfig) -> int:
    """Ranks that the job has on this machine."""
    return cfg.ranks or (local.num_gpus() if _is_on_gpu(cfg) else 1)


def split_threads(cfg: TrainerConfig, *, with_teacher: bool) -> Threads:
    """This machine's cores, divided among the ranks; a teacher on the same CPU gets half of them first.

    One thread more than there are cores costs little, because the teacher works while ranks wait and the other way
    round; several per core would make every matrix product wait for its slowest thread.
    """
    cores = local.num_cores()
    teacher = max(1, cores // 2)
    left = cores - teacher if with_teacher and not _is_on_gpu(cfg) else cores
    return Threads(teacher=teacher, rank=max(1, left // num_ranks(cfg)))


def teacher_command(
    path: Path,
    cfg: TeacherConfig,
    *,
    threads: int,
    on_line: Callable[[str], None],
    overrides: Sequence[str] = (),
) -> local.Command:
    """The command of the teacher server in `path`; ports that the file does not set are any free ones."""
    free = [f"server.{port}=0" for port in ("port", "rest_port") if port not in cfg.server.model_fields_set]
    return local.Command(
        name="teacher",
        argv=(sys.executable, "-m", "kdmesh_teacher", str(path), *set_arguments([*free, *overrides])),
        env=local.thread_limits(threads),
        on_line=on_line,
        is_shown=True,
        grace_s=cfg.server.drain_s + _TEACHER_GRACE_S,
    )


def serve_teacher(processes: local.Processes, command: local.Command) -> str:
    """Start a teacher server and wait until it answers; its host:port. Raises ChildFailed."""
    address: str = processes.serve(command, ready_within_s=_TEACHER_READY_S)["grpc"]
    return address


def rank_commands(
    path: Path,
    overrides: Sequence[str],
    *,
    ranks: int,
    threads: int,
    on_line: Callable[[str], None] | None = None,
) -> list[local.Command]:
    """The commands of the ranks of the trainer in `path`."""
    argv = (sys.executable, "-m", "kdmesh_trainer", str(path), *set_arguments(overrides))
    return local.rank_commands(argv, ranks=ranks, threads=threads, on_line=on_line)


def served(address: str) -> list[str]:
    """The overrides that make a trainer use the teacher at `address`."""
    return [f"teacher.addresses=['{address}']"]


def set_arguments(overrides: Sequence[str]) -> list[str]:
    """The command-line form of overrides."""
    return [argument for override in overrides for argument in ("--set", override)]


def _checked_trainer(path: Path, overrides: Sequence[str]) -> TrainerConfig:
    cfg = config.load(TrainerConfig, path, overrides)
    check.refuse_missing(cfg, source=path)
    if isinstance(cfg.objective, Distill) and not (cfg.teacher and cfg.teacher.addresses):
        raise ConfigError(
            f"{path}: teacher.addresses is empty: name a running teacher there, or start one with --serve TEACHER.YAML"
        )
    return cfg


def _checked_teacher(path: Path) -> TeacherConfig:
    cfg = config.load(TeacherConfig, path)
    check.refuse_missing(cfg, source=path)
    return cfg


def _is_on_gpu(cfg: TrainerConfig) -> bool:
    return cfg.student.device != "cpu" and local.num_gpus() > 0


def kept(write: Callable[[str], object], *, show: Callable[[str], object]) -> Callable[[str], None]:
    """What takes a service's output: every line is written; those that need a person are shown too."""

    def on_line(line: str) -> None:
        write(line + "\n")
        if is_urgent(line):
            show(line)

    return on_line


def _echo(line: str) -> None:
    click.echo(line, err=True)
