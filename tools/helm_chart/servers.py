"""Values of the teacher and rollout servers; what a server can be told itself stands in its own config.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kdmesh.serving.jobs.config import JobTerms
from kdmesh_teacher.config import TeacherJobTerms
from tools.helm_chart.sections import CaSecret, ChartModel, Objects, SecretKey, TokenSecret


class Model(ChartModel):
    """The model that a server loads."""

    uri: str = Field("", pattern=r"^(hf://[\w.-]+/[\w.-]+(@[\w./-]+)?|pvc://[a-z0-9.-]+(/\S*)?|/\S+)?$")
    """hf://ORG/NAME or hf://ORG/NAME@REVISION is fetched into modelCache before the server starts; pvc://CLAIM/PATH is
    read from a claim that exists; /PATH lies in the image or in one of `volumes`. An engine of kind fake needs none."""

    token_secret: TokenSecret = TokenSecret()
    """Token of Hugging Face for hf:// models that need one."""

    endpoint: str = Field("", pattern=r"^(https?://\S+)?$")
    """Another hub than Hugging Face's, as a mirror of it."""


class Gpus(ChartModel):
    """GPUs of one pod; the parallel sizes of config.engine must need exactly these."""

    per_node: int = Field(1, ge=0)
    """How many; 0 for a CPU."""

    resource: str = "nvidia.com/gpu"
    """Name under which the device plugin offers them."""


class Resources(ChartModel):
    """Of the server's container; GPUs and RDMA devices are added to both."""

    requests: dict[str, str | int | float] = Field({"cpu": "4", "memory": "32Gi"})
    """What is kept free for it."""

    limits: dict[str, str | int | float] = Field({"memory": "32Gi"})
    """Where it ends. All slots of a teacher's slab are charged to its memory."""


class Rdma(ChartModel):
    """RDMA devices of a pod."""

    resource: str = ""
    """As rdma/ib, rdma/rdma_shared_device_a or vpc.amazonaws.com/efa; empty for none."""

    count: int = Field(1, ge=1)
    """How many of it."""

    networks: str = ""
    """Value of the annotation k8s.v1.cni.cncf.io/networks, where Multus gives the pod further networks."""


class Autoscaling(ChartModel):
    """Replicas by the tokens that wait. In place of `replicas`."""

    enabled: bool = False
    """Whether."""

    kind: Literal["keda", "hpa"] = "keda"
    """keda asks Prometheus and needs KEDA. hpa needs an adapter that offers the metric as one of pods."""

    min_replicas: int = Field(1, ge=1)
    """Fewest."""

    max_replicas: int = Field(4, ge=1)
    """Most."""

    queued_tokens_per_replica: int = Field(200_000, ge=1)
    """Tokens that may wait for each replica: its measured tokens/s times the seconds a request may wait."""

    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    """Where keda asks."""

    prometheus_token_secret: TokenSecret = TokenSecret()
    """Bearer token that keda shows there; empty for a Prometheus that asks for none."""

    prometheus_ca_secret: CaSecret = CaSecret()
    """Who vouches for the certificate of an https:// Prometheus, beside the authorities that keda trusts already; keda
    reads it only with a token."""

    query: str = ""
    """PromQL of the tokens that wait at all replicas; empty takes those of this release's pods."""

    polling_seconds: int = Field(15, ge=1)
    """How often keda asks."""

    scale_down_after_seconds: int = Field(1800, ge=0, le=3600)
    """How long it must need fewer; a new replica has a model to load."""


class DisruptionBudget(ChartModel):
    """How many pods a drain of nodes may take at once."""

    enabled: bool = True
    """Whether there is one."""

    max_unavailable: int | str = 1
    """A number or a percentage. 0 lets no node be drained before somebody deletes the pod."""


class Server(ChartModel):
    """What teachers and rollouts have in common."""

    enabled: bool
    """Whether the release has any."""

    replicas: int | None = Field(None, ge=0)
    """How many servers; null for 1, or for as many as `autoscaling` wants."""

    model: Model = Model()
    """The model that it loads."""

    config: dict[str, Any]
    """The server's own configuration."""

    gpus: Gpus = Gpus()
    """GPUs of one pod."""

    resources: Resources = Resources()
    """Of the server's container."""

    shm_size: str = "1Gi"
    """Most that /dev/shm may take, which NCCL uses between the GPUs of a pod; charged to the memory. Empty leaves the
    container its own 64 MiB."""

    rdma: Rdma = Rdma()
    """RDMA devices of a pod, from a device plugin. For `server.rdma` the container runtime must not limit locked memory
    (LimitMEMLOCK)."""

    startup_minutes: int = Field(60, ge=1)
    """How long loading the model may take before the pod is started again."""

    pre_stop_seconds: int = Field(10, ge=0)
    """How long a pod that is to end still takes requests, until clients have seen that it leaves."""

    grace_margin_seconds: int = Field(30, ge=5)
    """Time to end beyond preStopSeconds and config.server.drain_s, before it is killed."""

    disruption_budget: DisruptionBudget = DisruptionBudget()
    """How many pods a drain of nodes may take."""

    autoscaling: Autoscaling = Autoscaling()
    """Replicas by the tokens that wait."""

    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the server and of what fetches its model, as {HTTPS_PROXY: http://proxy:3128}; no secrets."""

    secret_env: dict[str, SecretKey] = Field(default_factory=dict)
    """Environment from Secrets, as {NAME: {name: SECRET, key: KEY}}."""

    pod_labels: dict[str, str] = Field(default_factory=dict)
    """Further labels of the pods and of what makes them, where Kueue looks for kueue.x-k8s.io/queue-name."""

    pod_annotations: dict[str, str] = Field(default_factory=dict)
    """Further annotations."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have."""

    tolerations: Objects = Field(default_factory=list)
    """Taints of nodes that do not matter."""

    affinity: dict[str, Any] = Field(default_factory=dict)
    """Where pods go, by Kubernetes' own rules."""

    topology_spread_constraints: Objects = Field(default_factory=list)
    """How pods are spread."""

    priority_class_name: str = ""
    """Class of their priority."""

    runtime_class_name: str = ""
    """As nvidia, where GPUs need a runtime of their own."""

    scheduler_name: str = ""
    """Another scheduler than the cluster's default."""

    volumes: Objects = Field(default_factory=list)
    """Further volumes."""

    volume_mounts: Objects = Field(default_factory=list)
    """Where they lie in the containers of the server and of what fetches its model."""

    containers: Objects = Field(default_factory=list)
    """Further containers of the pod."""

    init_containers: Objects = Field(default_factory=list)
    """Further containers that end before the server starts."""


class Sharing(ChartModel):
    """Where the broker's socket lies."""

    mode: Literal["pod", "claim", "hostPath"] = "pod"
    """pod: containers of the pod itself; all others get rows over the network. claim: pods that mount the same claim,
    which Pod Security `restricted` allows. hostPath: pods that mount the same directory of the node, which it does
    not allow."""

    existing_claim: str = ""
    """With mode claim: a claim on a local volume. Empty makes one, and its volume, for `node`."""

    node: str = ""
    """With mode claim: name of the node that the volume is on; teacher and clients then run there."""

    path: str = Field("/var/lib/kdmesh/run", pattern=r"^/\S+$")
    """Directory of the node, for the volume that is made, and for hostPath."""

    prepare: bool = False
    """With mode hostPath: an init container that runs as root gives the directory to podSecurity.runAsUser. Otherwise
    it must be that user's already."""


class Jobs(ChartModel):
    """What single jobs may take."""

    overrides: dict[str, JobTerms] = Field(default_factory=dict)
    """By the job's name, as {production: {weight: 4}}; docs/sharing.md has the keys. These count before
    config.jobs.overrides."""

    existing_config_map: str = ""
    """Or a ConfigMap of yours, with `overrides` as YAML in its key jobs.yaml."""


class TeacherJobs(Jobs):
    """What single jobs may take of a teacher."""

    overrides: dict[str, TeacherJobTerms] = Field(default_factory=dict)  # type: ignore[assignment]
    """By the job's name, as {production: {weight: 4}}; docs/sharing.md has the keys. These count before
    config.jobs.overrides."""


class RowCache(ChartModel):
    """A volume for config.cache.directory_mib, so that rows outlive the pod."""

    enabled: bool = False
    """Whether each replica gets one; not over several nodes."""

    size: str = "100Gi"
    """Size of each; more than config.cache.directory_mib."""

    storage_class: str = ""
    """Of a quick local disk; empty takes the cluster's default."""


class LeaderWorkerSet(ChartModel):
    """How the pods of a teacher over several nodes belong together."""

    restart_policy: Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"] = (
        "RecreateGroupOnPodRestart"
    )
    """What happens when one pod of a group dies. RecreateGroupAfterStart needs LeaderWorkerSet 0.9."""

    port: int = Field(20000, ge=1024, le=65535)
    """Port of the first pod at which the processes of a group meet."""

    exclusive_topology: str = ""
    """Label of nodes, as that of a rack, of whose values each has one group at most; empty for none."""


class Teacher(Server):
    """Teacher servers."""

    enabled: bool = True
    """Whether the release has any."""

    nodes: int = Field(1, ge=1)
    """Nodes that one copy of the model spans. More than 1 needs LeaderWorkerSet in the cluster, and an engine of kind
    sglang."""

    config: dict[str, Any] = {  # noqa: RUF012 - of pydantic
        "engine": {"kind": "sglang"},
        "server": {"host": "0.0.0.0", "port": 50051, "rest_port": 8051, "drain_s": 30},
        "slab": {"slots": 16, "slot_mib": 64},
    }
    """The server's own configuration (services/teacher_server/kdmesh_teacher/config.py). What the chart decides (where
    the model lies, node ranks, files of tokens and certificates, the runtime directory) cannot be given here. A change
    restarts the pods."""

    jobs: TeacherJobs = TeacherJobs()
    """What single jobs may take, in a ConfigMap of its own: a change reaches the servers within about a minute, without
    a restart."""

    sharing: Sharing = Sharing()
    """Where the socket lies by which clients on the same node get rows without a copy. They mount the same directory
    at /run/kdmesh and run as the same user."""

    row_cache: RowCache = RowCache()
    """A volume for rows that are kept."""

    leader_worker_set: LeaderWorkerSet = LeaderWorkerSet()
    """Groups of pods, with nodes above 1."""


class Rollout(Server):
    """Rollout servers."""

    enabled: bool = False
    """Whether the release has any."""

    config: dict[str, Any] = {  # noqa: RUF012 - of pydantic
        "engine": {"kind": "sglang"},
        "server": {"host": "0.0.0.0", "port": 50061, "rest_port": 8061, "drain_s": 30},
    }
    """The server's own configuration (services/rollout_server/kdmesh_rollout/config.py). What the chart decides (where
    the model lies, node ranks, files of tokens and certificates, the runtime directory) cannot be given here. A change
    restarts the pods."""

    jobs: Jobs = Jobs()
    """What single jobs may take, in a ConfigMap of its own: a change reaches the servers within about a minute, without
    a restart."""

    max_surge: int = Field(0, ge=0)
    """New pods beside the old ones during an upgrade; they need free GPUs."""
