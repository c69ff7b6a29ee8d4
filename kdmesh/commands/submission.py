"""A trainer's configuration made into a job of a cluster, with all that can be checked before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml
from pydantic import BaseModel

from kdmesh import config
from kdmesh.auth.config import is_loopback
from kdmesh.cluster.plan import TEMPORARY, WORK, JobKind, JobPlan, Mount, Output, Resources, SecretVariable, Taint
from kdmesh.cluster.pods import RENDEZVOUS_PORT
from kdmesh.errors import ConfigError
from kdmesh.hub import named_in
from kdmesh.plain_yaml import Dumper
from kdmesh.preflight import check
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sections.teacher_config import teacher_key

_CPUS_PER_RANK = 4
_MEMORY_GIB_PER_RANK = 32
_STORAGE = "100Gi"
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")  # as the chart has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the command line says of a job, as it says it."""

    nodes: int
    gpus: int
    image: str
    name: str | None = None
    queue: str | None = None
    cpus: str | None = None
    memory: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    resources: tuple[str, ...] = ()  # NAME=AMOUNT
    claim: str | None = None
    storage: str | None = None
    storage_class: str | None = None
    volumes: tuple[str, ...] = ()  # CLAIM:/path[:rw]
    secrets: tuple[str, ...] = ()  # SECRET:/path
    secret_variables: tuple[str, ...] = ()  # NAME=SECRET/KEY
    variables: tuple[str, ...] = ()  # NAME=VALUE
    in_image: tuple[str, ...] = ()  # directories that the image holds
    node_labels: tuple[str, ...] = ()  # NAME=VALUE
    tolerated: tuple[str, ...] = ()  # KEY[=VALUE][:EFFECT]
    service_account: str | None = None
    pull_secret: str | None = None
    retries: int = 3
    grace_s: int = 600
    user: int = 10001


def plan(path: Path, overrides: Sequence[str], wishes: Wishes, kind: JobKind) -> JobPlan:
    """The job of the configuration in `path`. Raises ConfigError with everything that is wrong with it."""
    tree = config.read_tree(path, overrides)
    for key, text in named_in(tree):
        raise ConfigError(f"{path}: {key} is {text}, and jobs in a cluster fetch nothing: give a path on a --volume")
    cfg = check.load_as(TrainerConfig, path, overrides)
    mounts = (*map(_volume, wishes.volumes), *map(_secret, wishes.secrets))
    output = WORK / PurePosixPath(cfg.output)
    name = wishes.name or _name(cfg)
    made = JobPlan(
        name=name,
        kind=kind,
        image=wishes.image,
        config=yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True),
        output_path=str(output),
        nodes=wishes.nodes,
        resources=_resources(wishes),
        output=_output(wishes, name),
        retries=wishes.retries,
        grace_s=wishes.grace_s,
        user=wishes.user,
        mounts=mounts,
        secrets=tuple(map(_secret_variable, wishes.secret_variables)),
        variables=tuple(map(_variable, wishes.variables)),
        queue=wishes.queue,
        service_account=wishes.service_account,
        asks_cluster=any(address.startswith("k8s:") for address in _addresses(cfg)),
        node_labels=tuple(_pair(text, "--node-label", "NAME=VALUE") for text in wishes.node_labels),
        tolerated=tuple(map(_taint, wishes.tolerated)),
        pull_secret=wishes.pull_secret,
        metrics_port=None if cfg.metrics is None else cfg.metrics.port,
    )
    lines = [
        *_unservable(cfg),
        *_unread(cfg, made),
        *_unreachable(cfg),
        *_unfit_ranks(cfg, made),
        *_misplaced(cfg, made, wishes.in_image),
    ]
    if lines:
        count = "1 thing is" if len(lines) == 1 else f"{len(lines)} things are"
        raise ConfigError(
            "\n".join([f"{path}: {count} wrong for a job in a cluster", *(f"  {line}" for line in lines)])
        )
    return made


def _name(cfg: TrainerConfig) -> str:
    """That of the output directory, as names are in a cluster."""
    return re.sub(r"[^a-z0-9]+", "-", cfg.job_name.lower()).strip("-") or "train"


def _output(wishes: Wishes, name: str) -> Output:
    if wishes.claim is None:
        return Output(claim=f"{name}-output", size=wishes.storage or _STORAGE, storage_class=wishes.storage_class)
    for option, value in (("--storage", wishes.storage), ("--storage-class", wishes.storage_class)):
        if value is not None:
            raise ConfigError(f"{option} is for a claim that is made, and --claim {wishes.claim} is there already")
    return Output(claim=wishes.claim, size=None)


def _resources(wishes: Wishes) -> Resources:
    ranks = max(1, wishes.gpus)
    return Resources(
        gpus=wishes.gpus,
        gpu_resource=wishes.gpu_resource,
        cpus=wishes.cpus or str(_CPUS_PER_RANK * ranks),
        memory=wishes.memory or f"{_MEMORY_GIB_PER_RANK * ranks}Gi",
        others=tuple(_pair(text, "--resource", "NAME=AMOUNT") for text in wishes.resources),
    )


# What is wrong with it


def _unservable(cfg: TrainerConfig) -> Iterator[str]:
    """Servers that the job needs and does not name."""
    for name, teacher in cfg.asked_teachers.items():
        if not teacher.addresses:
            yield f"{teacher_key(name)}.addresses is empty: name a running teacher there"
    if isinstance(cfg.source, OnPolicy) and not cfg.source.rollouts.addresses:
        yield "source.rollouts.addresses is empty: name a running rollout server there"
    if cfg.evaluation.rollouts is not None and not cfg.evaluation.rollouts.addresses:
        yield "evaluation.rollouts.addresses is empty: name a running rollout server there"


def _unread(cfg: TrainerConfig, made: JobPlan) -> Iterator[str]:
    """Metrics that Prometheus, which is elsewhere, could not read."""
    if cfg.metrics is not None and is_loopback(cfg.metrics.host):
        yield f"metrics.host is {cfg.metrics.host}, which nobody reaches from outside the pod: set 0.0.0.0"
    if cfg.metrics is not None and cfg.metrics.port == 0:
        yield "metrics.port is 0, any free one: in a cluster it must be known"
    if cfg.metrics is not None and cfg.metrics.port == RENDEZVOUS_PORT and made.nodes > 1:
        yield f"metrics.port is {RENDEZVOUS_PORT}, where the nodes of a job meet: choose another"


def _unreachable(cfg: TrainerConfig) -> Iterator[str]:
    yield from check.wrong_addresses(cfg)
    for address in _addresses(cfg):
        if is_loopback(address.rpartition(":")[0]):
            yield f"{address} is the job's own node: give the address of a server in the cluster, as teacher.ml:50051"


def _unfit_ranks(cfg: TrainerConfig, made: JobPlan) -> Iterator[str]:
    ranks, gpus = made.resources.ranks, made.resources.gpus
    if cfg.ranks is not None and cfg.ranks != ranks:
        yield f"ranks is {cfg.ranks}, and with --gpus {gpus} each node has {ranks}: leave one of them out"
    if cfg.student.device == "cuda" and not gpus:
        yield "student.device is cuda, and --gpus is 0"
    if cfg.student.device == "cpu" and gpus:
        yield f"student.device is cpu, and --gpus is {gpus}: they would lie idle"
    try:
        cfg.parallel.check_ranks(made.nodes * ranks)
    except ConfigError as error:
        yield str(error)


def _misplaced(cfg: TrainerConfig, made: JobPlan, in_image: Sequence[str]) -> Iterator[str]:
    """Files and directories that no node would find, or that would be gone with it."""
    readable = [mount.path for mount in made.mounts] + [PurePosixPath(path) for path in in_image]
    writable = [WORK, *(mount.path for mount in made.mounts if not mount.is_read_only)]
    if made.output.size is None:
        readable.append(WORK)
    for key, path in _paths(cfg):
        where = WORK / PurePosixPath(path)
        if key == "output":
            if not _is_in(where, writable):
                yield f"output: {path} is on no volume that can be written to, and would be gone with the job"
        elif key == "data.token_cache.directory":  # made by the job, which may lose it
            if not _is_in(where, [*writable, TEMPORARY]):
                yield f"{key}: {path} is on no volume that can be written to; {TEMPORARY} is one, of each node"
        elif _is_in(where, readable):
            continue
        elif _is_in(where, [WORK]):
            yield (
                f"{key}: {path} would lie on the claim {made.output.claim}, which is empty at first: give an absolute "
                "path on a --volume, or name a --claim that holds it"
            )
        else:
            yield f"{key}: {path} is on no --volume and no --secret; or say --in-image if the image holds it"


def _paths(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Every file and directory that a configuration names, with its key."""
    for name in type(section).model_fields:
        yield from _paths_in(getattr(section, name), f"{prefix}{name}")


def _paths_in(value: object, key: str) -> Iterator[tuple[str, Path]]:
    match value:
        case Path():
            yield key, value
        case BaseModel():
            yield from _paths(value, f"{key}.")
        case dict():
            for name, one in value.items():
                yield from _paths_in(one, f"{key}.{name}")
        case tuple() | list():
            for one in value:
                yield from _paths_in(one, key)


def _is_in(path: PurePosixPath, directories: Sequence[PurePosixPath]) -> bool:
    return ".." not in path.parts and any(path.is_relative_to(directory) for directory in directories)


def _addresses(cfg: TrainerConfig) -> Iterator[str]:
    return (address for _, _, addresses in check.servers(cfg) for address in addresses)


# Words of the command line


def _volume(text: str) -> Mount:
    claim, colon, rest = text.partition(":")
    path, _, mode = rest.partition(":")
    if not claim or not colon or mode not in ("", "ro", "rw"):
        raise ConfigError(f"--volume {text!r} is not of the form CLAIM:/path, or CLAIM:/path:rw")
    return Mount(source=claim, path=PurePosixPath(path), kind="claim", is_read_only=mode != "rw")


def _secret(text: str) -> Mount:
    secret, colon, path = text.partition(":")
    if not secret or not colon:
        raise ConfigError(f"--secret {text!r} is not of the form SECRET:/path")
    return Mount(source=secret, path=PurePosixPath(path), kind="secret")


def _secret_variable(text: str) -> SecretVariable:
    form = "NAME=SECRET/KEY"
    name, reference = _pair(text, "--secret-env", form)
    secret, slash, key = reference.partition("/")
    if not (secret and slash and key):
        raise ConfigError(f"--secret-env {text!r} is not of the form {form}")
    return SecretVariable(name=name, secret=secret, key=key)


def _variable(text: str) -> tuple[str, str]:
    name, value = _pair(text, "--env", "NAME=VALUE")
    if _SECRET.search(name):
        raise ConfigError(
            f"--env {name} looks like a secret, which whoever may look at the job would read: put it in a Secret, and "
            f"say --secret-env {name}=SECRET/KEY"
        )
    return name, value


def _taint(text: str) -> Taint:
    taint, _, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if not key:
        raise ConfigError(f"--tolerate {text!r} is not of the form KEY[=VALUE][:EFFECT]")
    return Taint(key=key, value=value if equals else None, effect=effect or None)


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"{option} {text!r} is not of the form {form}")
    return name, value
