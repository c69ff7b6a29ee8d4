"""What a training job in a cluster is to be, before it is written as manifests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from kdmesh.cluster import names
from kdmesh.errors import ConfigError

WORK = PurePosixPath("/work")
"""Where the claim of the job's output is mounted; relative paths of its configuration start here."""

CONFIG = PurePosixPath("/etc/kdmesh")
"""Where the ConfigMap is mounted."""

TEMPORARY = PurePosixPath("/tmp")
"""Where each node may write what is gone with it."""

CONFIG_FILE = "train.yaml"
STOPPED = 75
"""Exit code of a node whose run was stopped before its last step, and continues when it is started again."""

REFUSED = 2
"""Exit code of a node that was refused its input: to start it again changes nothing."""

OWN_VARIABLES = frozenset(
    {
        "PET_NNODES",
        "PET_NPROC_PER_NODE",
        "PET_NODE_RANK",
        "PET_MASTER_ADDR",
        "PET_MASTER_PORT",
        "KDMESH_EXIT_WHEN_STOPPED",
        "KDMESH_NODE_NAME",
        "KDMESH_NAMESPACE",
    }
)
"""Environment variables by which the nodes of a job find each other and say how they ended."""

JobKind = Literal["Job", "JobSet", "TrainJob"]

# A pod is called NAME-node-0-INDEX-xxxxx, and that must fit into 63 characters.
_LONGEST_NAME = 45
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_SET_ELSEWHERE = {"cpu": "--cpus", "memory": "--memory"}
_RESERVED = (WORK, CONFIG, TEMPORARY, PurePosixPath("/dev/shm"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A claim, or a secret, at a path of every node."""

    source: str  # name of the PersistentVolumeClaim or Secret
    path: PurePosixPath
    kind: Literal["claim", "secret"]
    is_read_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretVariable:
    """An environment variable with a value that only the cluster knows."""

    name: str
    secret: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taint:
    """What keeps others from some machines, and not this job."""

    key: str
    value: str | None = None  # None: any
    effect: str | None = None  # None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The claim that checkpoints, metrics and the final model are written to; it outlives the job."""

    claim: str
    size: str | None  # to make it with; None: it is there
    storage_class: str | None = None  # of a claim that is made; None takes the cluster's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one node of a job gets."""

    gpus: int
    cpus: str
    memory: str
    gpu_resource: str = "nvidia.com/gpu"
    others: tuple[tuple[str, str], ...] = ()  # name and amount, as of RDMA devices

    @property
    def ranks(self) -> int:
        """Processes on one node: one per GPU, or one without."""
        return max(1, self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """One job. Raises ConfigError when it cannot be."""

    name: str
    kind: JobKind
    image: str
    config: str  # the trainer's configuration, YAML
    output_path: str  # where that configuration writes to, as seen by the nodes
    nodes: int
    resources: Resources
    output: Output
    retries: int  # restarts after failures; those after a preemption are not counted
    grace_s: int  # from SIGTERM to SIGKILL: the step under way and a checkpoint must fit
    user: int  # number of the user that everything runs as
    mounts: tuple[Mount, ...]
    secrets: tuple[SecretVariable, ...]
    variables: tuple[tuple[str, str], ...]
    queue: str | None  # of Kueue
    service_account: str | None
    asks_cluster: bool  # whether its nodes look for servers by the API
    node_labels: tuple[tuple[str, str], ...]  # that a machine must have
    tolerated: tuple[Taint, ...]  # that a machine may have, beside that of its GPUs
    pull_secret: str | None  # to fetch the image with
    metrics_port: int | None  # where the first node shows its metrics

    def __post_init__(self) -> None:
        """Refuse what the cluster would refuse later, or would not."""
        if not _NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise ConfigError(
                f"the job's name {self.name!r} must be at most {_LONGEST_NAME} lower-case letters, digits and dashes, "
                "begin with a letter and not end with a dash: choose one with --name"
            )
        if self.kind == "Job" and self.nodes > 1:
            raise ConfigError(f"a Job has one node, not {self.nodes}: take a JobSet or a TrainJob")
        others = (amount for _, amount in self.resources.others)
        for quantity in (self.resources.cpus, self.resources.memory, self.output.size or "1", *others):
            if not _QUANTITY.fullmatch(quantity):
                raise ConfigError(f"{quantity!r} is no quantity of Kubernetes, as 8, 500m or 64Gi are")
        for taint in self.tolerated:
            if taint.effect not in (None, *_EFFECTS):
                raise ConfigError(f"{taint.effect!r} is no effect of a taint, as {', '.join(_EFFECTS)} are")
        if self.user < 1:
            raise ConfigError(f"--user {self.user}: a job runs as an ordinary user, of a number above 0")
        self._refuse_unfit_names()
        self._refuse_unfit_variables()
        self._refuse_unfit_mounts()

    def _refuse_unfit_names(self) -> None:
        for source, kind in [(mount.source, mount.kind) for mount in self.mounts]:
            names.require(names.is_object, source, f"the name of a {kind}")
        for one in self.secrets:
            names.require(names.is_object, one.secret, "the name of a secret")
        names.require(names.is_object, self.output.claim, "the name of a claim")
        names.require(names.is_object, self.output.storage_class, "the name of a storage class")
        names.require(names.is_object, self.service_account, "the name of a service account")
        names.require(names.is_object, self.pull_secret, "the name of a secret")
        names.require(names.is_object, self.queue, "the name of a queue")
        for resource in (self.resources.gpu_resource, *(name for name, _ in self.resources.others)):
            names.require(names.is_key, resource, "the name of a resource")
            if resource in _SET_ELSEWHERE:
                raise ConfigError(f"{resource} is not a resource of its own: say {_SET_ELSEWHERE[resource]}")
        for key, value in (*self.node_labels, *((taint.key, taint.value) for taint in self.tolerated)):
            names.require(names.is_key, key, "the key of a label or a taint")
            names.require(names.is_label_value, value, "the value of a label or a taint")

    def _refuse_unfit_variables(self) -> None:
        given = [name for name, _ in self.variables] + [one.name for one in self.secrets]
        for name in given:
            names.require(names.is_variable, name, "the name of an environment variable")
            if name in OWN_VARIABLES:
                raise ConfigError(f"the environment variable {name} is the job's own")
            if given.count(name) > 1:
                raise ConfigError(f"the environment variable {name} is given twice")

    def _refuse_unfit_mounts(self) -> None:
        paths = [mount.path for mount in self.mounts]
        for path in paths:
            if not path.is_absolute() or ".." in path.parts or path == PurePosixPath("/"):
                raise ConfigError(f"a volume cannot be mounted at {path}: give an absolute path below /")
            taken = [other for other in _RESERVED if path == other or path in other.parents]
            if taken or paths.count(path) > 1:
                raise ConfigError(
                    f"a volume cannot be mounted at {path}: {taken[0] if taken else 'another one'} is there"
                )
            if path.is_relative_to(CONFIG):
                raise ConfigError(f"a volume cannot be mounted at {path}: nothing can be written to {CONFIG}")
