"""Runs one training job on this machine: its ranks, with servers of their own when asked to."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from kdmesh import config
from kdmesh.allowance import num_cores
from kdmesh.errors import ConfigError
from kdmesh.file_lock import claimed
from kdmesh.launch import local
from kdmesh.launch.machine_fit import refuse_unfit_machine
from kdmesh.launch.place import Place, exit_when_stopped, place, ranks_per_node
from kdmesh.launch.program import program
from kdmesh.launch.service_log import kept_in
from kdmesh.outputs import tell
from kdmesh.preflight import check
from kdmesh.preflight.teacher_fit import refuse_unfit_teacher
from kdmesh.serving.config import ListenConfig
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.saved_config import refuse_other_configuration
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sections.teacher_config import TEACHER_NAME, teacher_key

# Loading a large model takes minutes; a server that cannot says so at once by exiting.
_SERVER_READY_S = 1800.0
# Beyond the requests it may finish, the time that unloading takes.
_SERVER_GRACE_S = 10.0
# What a rank ends with on a signal that comes before it has anything to save.
_BEFORE_ITS_FIRST_STEP = (-signal.SIGTERM, 128 + signal.SIGINT)
_NAMED = re.compile(rf"(?P<name>{TEACHER_NAME})=(?P<file>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A server that a job may start for itself."""

    name: str
    package: str
    config: type[TeacherConfig] | type[RolloutConfig]
    addresses: str  # the trainer's key that says where it is


TEACHER = Service(name="teacher", package="kdmesh_teacher", config=TeacherConfig, addresses="teacher.addresses")
ROLLOUT = Service(name="rollout", package="kdmesh_rollout", config=RolloutConfig, addresses="source.rollouts.addresses")


def teachers_to_serve(wanted: Sequence[str]) -> dict[Service, Path]:
    """The teachers that `--serve FILE`, or several of `--serve NAME=FILE`, ask for. Raises ConfigError."""
    serve: dict[Service, Path] = {}
    for text in wanted:
        name, file = named_file(text)
        key = f"{teacher_key(name)}.addresses"
        service = replace(TEACHER, name=f"teacher-{name}", addresses=key) if name else TEACHER
        if service in serve:
            raise ConfigError(f"--serve {text}: there is a server for {service.addresses} already")
        serve[service] = file
    return serve


def named_file(text: str) -> tuple[str, Path]:
    """Name and file of `NAME=FILE`, or no name and the file: a path may hold an equals sign, too."""
    found = _NAMED.fullmatch(text)
    return ("", Path(text)) if found is None else (found["name"], Path(found["file"]))


def rollout_to_serve(path: Path, overrides: Sequence[str]) -> Service:
    """The rollout server of the trainer in `path`: it samples for an on-policy run, else it answers questions."""
    source = config.read_tree(path, overrides).get("source")
    is_sampled = isinstance(source, dict) and source.get("kind") == "on_policy"
    return ROLLOUT if is_sampled else replace(ROLLOUT, addresses="evaluation.rollouts.addresses")


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """CPU threads for each process of a job."""

    server: int
    rank: int


def train(path: Path, overrides: Sequence[str], serve: Mapping[Service, Path]) -> None:
    """Check everything, start the servers, read the data meanwhile, then start the ranks, and wait for them.

    A signal ends the run after the current step, or lets it be finished when no step is left; that is a success when
    every rank saved and left. On one of several machines (kdmesh/launch/place.py) only its own ranks are started.

    Args:
        serve: configuration files of servers for this run only.

    Raises:
        ConfigError: a configuration is bad, or names something that is not there; or with servers, the output cannot
            be written, or another run has it.
        CheckpointError: the configuration cannot continue the checkpoint that lies in its output.
        ChildFailed: a process ended that should not have.
        Stopped: a signal came, and a rank could not end cleanly.
    """
    here = place()
    if here is not None and serve:
        raise ConfigError(f"--serve starts a server on each machine, so it does not go with a job of {here.nodes}")
    servers = {service: _checked_server(service, file) for service, file in serve.items()}
    _refuse_same_port([(serve[service], server.server) for service, server in servers.items()])
    later = _addresses_to_come(path, overrides, serve)
    cfg = _checked_trainer(path, [*overrides, *later])
    refuse_unfit_machine(cfg, ranks=num_ranks(cfg) * (1 if here is None else here.nodes))
    if serve and cfg.metrics is not None:  # the first rank finds the same, but only when the servers have loaded
        cfg.metrics.refuse_taken()
    for server in servers.values():
        if isinstance(server, TeacherConfig):
            refuse_unfit_teacher(cfg, server)
    refuse_other_configuration(cfg)
    if serve:
        with claimed(cfg.output):  # the first rank claims it for the run, but only when the servers have loaded
            pass
    threads = split_threads(cfg, with_servers=bool(serve))
    earlier = _mark(cfg.output / "final")
    ranks: list[local.Child] = []
    try:
        with ExitStack() as stack:
            logs = {service: stack.enter_context(kept_in(_log_of(cfg, service), show=tell)) for service in serve}
            processes = stack.enter_context(local.Processes())
            read = _read_command(path, [*overrides, *later])
            is_kept = cfg.data.token_cache is not None  # so that the ranks need not read again
            with _meanwhile(processes, read, to_its_end=is_kept) if serve else nullcontext():
                for service, file in serve.items():
                    cores, log, told = threads.server, logs[service], _log_of(cfg, service)
                    command = server_command(service, file, servers[service], threads=cores, on_line=log)
                    tell(f"Starting the server of {file}; the run waits for its model. Its log: {told}")
                    overrides = [*overrides, *served(service, start_server(processes, command))]
            commands = rank_commands(path, overrides, ranks=num_ranks(cfg), threads=threads.rank, place=here)
            ranks = processes.start(*commands)
            _wait(processes, ranks)
    except local.Stopped:
        if not _has_ended_well(ranks):
            raise
        _tell_end(cfg, ranks, is_finished=_mark(cfg.output / "final") != earlier)


def _tell_end(cfg: TrainerConfig, ranks: Sequence[local.Child], *, is_finished: bool) -> None:
    """Say what became of a run whose ranks were to stop, and did. Raises ChildFailed where that is a failure."""
    stopped = exit_when_stopped()
    if stopped is not None and any(rank.exit_code == stopped for rank in ranks):
        raise local.ChildFailed("stopped before its last step; the next start continues", exit_code=stopped) from None
    if stopped is not None or is_finished:
        tell(f"The run had done its last step already, and was finished: the student is in {cfg.output / 'final'}.")
    else:
        tell(f"Stopped, with a checkpoint in {cfg.output}; the same command continues.")


def _has_ended_well(ranks: Sequence[local.Child]) -> bool:
    """Whether ranks that were to stop left in good order; says so of those that had nothing to save."""
    if ranks and all(rank.exit_code in (0, exit_when_stopped()) for rank in ranks):
        return True
    if ranks and all(rank.exit_code in _BEFORE_ITS_FIRST_STEP for rank in ranks):
        tell("Stopped before the first step: there is nothing to save.")
    return False


def _mark(path: Path) -> tuple[int, int] | None:
    """What tells a directory from another one that took its place; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def _meanwhile(processes: local.Processes, command: local.Command, *, to_its_end: bool) -> Iterator[None]:
    """Have a command run, to its end or as long as the context. Raises ChildFailed when it fails."""
    children = processes.start(command)
    yield
    has_refused = any(
        line.startswith("Error: ") for child in children for line in list(child.tail)
    )  # and is about to end
    if to_its_end or has_refused:
        processes.wait(children)
    processes.stop(children)


def _log_of(cfg: TrainerConfig, service: Service) -> Path:
    return cfg.output / f"{service.name}.log"


def _wait(processes: local.Processes, ranks: Sequence[local.Child]) -> None:
    try:
        processes.wait(ranks)
    except local.Stopped:
        tell("Stopping after this step, with a checkpoint, or now if there was none yet; once more ends at once.")
        raise


def num_ranks(cfg: TrainerConfig) -> int:
    """Ranks that the job has on this machine."""
    return ranks_per_node() or cfg.ranks or (local.num_gpus() if _is_on_gpu(cfg) else 1)


def split_threads(cfg: TrainerConfig, *, with_servers: bool) -> Threads:
    """This machine's cores, divided among the ranks; servers on the same CPU get the same half of them.

    One thread more than there are cores costs little, because servers work while ranks wait and the other way
    round; several per core would make every matrix product wait for its slowest thread.
    """
    cores = num_cores()
    server = max(1, cores // 2)
    left = cores - server if with_servers and not _is_on_gpu(cfg) else cores
    return Threads(server=server, rank=max(1, left // num_ranks(cfg)))


def server_command(
    service: Service,
    path: Path,
    cfg: TeacherConfig | RolloutConfig,
    *,
    threads: int,
    on_line: Callable[[str], None],
) -> local.Command:
    """The command of the server in `path`, which holds `cfg`; ports that the file does not set are any free ones."""
    free = [f"server.{port}=0" for port in ("port", "rest_port") if port not in cfg.server.model_fields_set]
    return local.Command(
        name=service.name,
        argv=program(service.package, path, free),
        env=local.thread_limits(threads),
        on_line=on_line,
        grace_s=cfg.server.drain_s + _SERVER_GRACE_S,
    )


def read_arguments(path: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """The command line that reads the data of the trainer in `path` as its ranks would, and needs no server."""
    return program("kdmesh_trainer.commands.read", path, overrides)


def _read_command(path: Path, overrides: Sequence[str]) -> local.Command:
    """What refuses the data while servers load; only ranks keep them."""
    return local.Command(
        name="reading the data",
        argv=read_arguments(path, overrides),
        env=local.thread_limits(1),
        on_line=lambda line: None if line.startswith("{") else tell(line),  # ranks will tell the events
        may_finish=True,
    )


def start_server(processes: local.Processes, command: local.Command) -> str:
    """Start a server and wait until it answers; its host:port. Raises ChildFailed."""
    address: str = processes.serve(command, ready_within_s=_SERVER_READY_S)["grpc"]
    return address


def rank_commands(
    path: Path,
    overrides: Sequence[str],
    *,
    ranks: int,
    threads: int,
    on_line: Callable[[str], None] | None = None,
    place: Place | None = None,
) -> list[local.Command]:
    """The commands of the ranks of the trainer in `path`, or of those that this machine has."""
    argv = program("kdmesh_trainer", path, overrides)
    return local.rank_commands(argv, ranks=ranks, threads=threads, on_line=on_line, place=place)


def served(service: Service, address: str) -> list[str]:
    """The overrides that make a trainer use the server at `address`."""
    return [f"{service.addresses}=['{address}']"]


def _addresses_to_come(path: Path, overrides: Sequence[str], serve: Mapping[Service, Path]) -> list[str]:
    """Overrides that stand for the addresses of servers which are not started yet.

    Raises:
        ConfigError: for `--serve FILE` where only `--serve NAME=FILE` says which of several teachers it is.
    """
    names = config.read_tree(path, overrides).get("teachers")
    if TEACHER in serve and isinstance(names, dict) and names:
        wanted = " ".join(f"--serve {name}=TEACHER.YAML" for name in names)
        raise ConfigError(f"--serve {serve[TEACHER]}: {path} has `teachers`, so a file needs a name: {wanted}")
    return [override for service in serve for override in served(service, "later:1")]


def _checked_trainer(path: Path, overrides: Sequence[str]) -> TrainerConfig:
    cfg = check.load_as(TrainerConfig, path, overrides)
    check.refuse_missing(cfg, source=path)
    for name, teacher in cfg.asked_teachers.items():
        if not teacher.addresses:
            serve = f"{name}=TEACHER.YAML" if name else "TEACHER.YAML"
            raise ConfigError(
                f"{path}: {teacher_key(name)}.addresses is empty: name a running teacher there, or start one with "
                f"--serve {serve}"
            )
    sampling = {"source.rollouts": cfg.source.rollouts} if isinstance(cfg.source, OnPolicy) else {}
    answering = {} if cfg.evaluation.rollouts is None else {"evaluation.rollouts": cfg.evaluation.rollouts}
    for key, rollouts in {**sampling, **answering}.items():
        if not rollouts.addresses:
            raise ConfigError(
                f"{path}: {key}.addresses is empty: name a running rollout server there, or start one with "
                "--serve-rollout ROLLOUT.YAML"
            )
    return cfg


def _checked_server(service: Service, path: Path) -> TeacherConfig | RolloutConfig:
    cfg = check.load_as(service.config, path)
    check.refuse_missing(cfg, source=path)
    return cfg


def _refuse_same_port(servers: Sequence[tuple[Path, ListenConfig]]) -> None:
    """Of two servers that want one port, the second would say so only when the first has loaded its model."""
    taken: dict[int, tuple[Path, str]] = {}
    for file, listen in servers:
        for key in ("port", "rest_port"):
            port = getattr(listen, key)
            if key not in listen.model_fields_set or port == 0:
                continue
            if port in taken:
                other, taken_by = taken[port]
                raise ConfigError(
                    f"server.{taken_by} of {other} and server.{key} of {file} are both {port}: leave them out, and any "
                    "free port is taken, or give each its own"
                )
            taken[port] = file, key


def _is_on_gpu(cfg: TrainerConfig) -> bool:
    return cfg.student.device != "cpu" and local.num_gpus() > 0
