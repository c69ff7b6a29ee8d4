"""All values of the Helm chart."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tools.helm_chart.sections import CaSecret, ChartModel, Objects, TokenSecret, TokensSecret
from tools.helm_chart.servers import Rollout, Teacher

_TRAINERS = {"app.kubernetes.io/name": "kdmesh", "app.kubernetes.io/component": "trainer"}


class Image(ChartModel):
    """One image."""

    repository: str
    """Name below the registry."""

    digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    """As sha256:...; nodes then take exactly this image, and the tag is for people only."""


class Images(ChartModel):
    """Where images come from."""

    registry: str = "ghcr.io/kdmesh"
    """Before every repository."""

    tag: str = ""
    """Of all images; empty takes the chart's appVersion."""

    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node fetches an image."""

    pull_secrets: list[str] = Field(default_factory=list)
    """Names of Secrets for the registry."""

    teacher: Image = Image(repository="teacher")
    """Of teacher servers."""

    rollout: Image = Image(repository="rollout")
    """Of rollout servers."""


class Auth(ChartModel):
    """Who may use the servers."""

    tokens_secret: TokensSecret = TokensSecret()
    """Secret with the file of bearer tokens; read again when it changes."""

    allow_anonymous: bool = False
    """Ask nobody who they are: only where the network holds trusted users only."""


class IssuerRef(ChartModel):
    """An issuer of cert-manager."""

    name: str = ""
    """Its name; empty for none."""

    kind: str = "Issuer"
    """Issuer or ClusterIssuer."""

    group: str = "cert-manager.io"
    """Its API group."""


class CertManager(ChartModel):
    """Certificates that cert-manager makes, one for each kind of server."""

    issuer_ref: IssuerRef = IssuerRef()
    """Who signs them; its name switches this on."""

    duration: str = "2160h"
    """How long one is good."""

    renew_before: str = "720h"
    """How long before its end it is renewed; servers take the new one without a restart."""


class Tls(ChartModel):
    """Encryption of gRPC and REST."""

    existing_secret: str = ""
    """Secret of type kubernetes.io/tls (tls.crt, tls.key), for all servers; read again when it changes."""

    cert_manager: CertManager = CertManager()
    """Or certificates that cert-manager makes."""

    client_ca_secret: CaSecret = CaSecret()
    """Authorities of clients; gRPC then refuses clients without a certificate of theirs."""


class NetworkPolicy(ChartModel):
    """Who reaches whom."""

    enabled: bool = True
    """Whether."""

    clients: Objects = Field([{"podSelector": {"matchLabels": dict(_TRAINERS)}}])
    """Peers that may use gRPC and REST, as entries of `from` in a NetworkPolicy; here the jobs of `kdmesh submit` in
    the release's namespace."""

    metrics: Objects = Field([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}])
    """Peers that may read /metrics."""

    all_ports_to_clients: bool = False
    """Open every port both ways between servers and clients: what private groups of gloo and NCCL choose. On by itself
    for teachers with config.server.groups."""

    egress: Objects = Field(default_factory=list)
    """Further rules of `egress`, as to a proxy, or to an issuer's keys. Names can always be looked up at ports 53 and
    5353, and hf:// models be fetched."""


class ServiceAccount(ChartModel):
    """Whom the pods run as towards Kubernetes; they never speak to it."""

    create: bool = True
    """Make one."""

    name: str = ""
    """Its name; empty takes the release's, or `default` where none is made."""

    annotations: dict[str, str] = Field(default_factory=dict)
    """Its annotations."""


class PodSecurity(ChartModel):
    """The user of all pods. Clients that share memory with a teacher must run as the same."""

    run_as_user: int = Field(10001, ge=1)
    """User."""

    run_as_group: int = Field(10001, ge=1)
    """Group."""

    fs_group: int = Field(10001, ge=1)
    """Group of the files in volumes."""


class ModelCache(ChartModel):
    """A volume of models."""

    existing_claim: str = ""
    """A claim that exists; empty makes one as soon as a model is hf://."""

    size: str = "500Gi"
    """Its size."""

    access_modes: list[Literal["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]] = Field(
        ["ReadWriteMany"], min_length=1
    )
    """ReadWriteOnce does for pods of one node."""

    storage_class: str = ""
    """Empty takes the cluster's default."""


class ServiceMonitor(ChartModel):
    """How an operator's Prometheus finds the servers."""

    enabled: bool = False
    """Whether; needs the CRDs of prometheus-operator."""

    interval: str = "15s"
    """How often it reads."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that this Prometheus looks for."""

    token_secret: TokenSecret = TokenSecret()
    """Bearer token of a viewer, where the servers ask who calls."""

    ca_secret: CaSecret = CaSecret()
    """Who vouches for the servers' certificates; empty takes ca.crt of the Secret with the certificate."""


class PodMonitor(ChartModel):
    """How an operator's Prometheus finds the jobs of `kdmesh submit` whose configuration has `metrics`."""

    enabled: bool = False
    """Whether; needs the CRDs of prometheus-operator."""

    interval: str = "15s"
    """How often it reads."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that this Prometheus looks for."""


class Rules(ChartModel):
    """Recording rules and alerts."""

    enabled: bool = False
    """Whether; needs the CRDs of prometheus-operator."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that this Prometheus looks for."""


class Dashboards(ChartModel):
    """Dashboards for Grafana, each in a ConfigMap."""

    enabled: bool = False
    """Whether."""

    labels: dict[str, str] = Field({"grafana_dashboard": "1"})
    """Labels that Grafana's sidecar looks for."""

    annotations: dict[str, str] = Field({"grafana_folder": "kdmesh"})
    """Annotations, as for the folder."""


class Monitoring(ChartModel):
    """What Prometheus and Grafana are told."""

    service_monitor: ServiceMonitor = ServiceMonitor()
    """How Prometheus finds the servers."""

    pod_monitor: PodMonitor = PodMonitor()
    """How Prometheus finds the jobs of `kdmesh submit` in the release's namespace; one release of it does for all."""

    rules: Rules = Rules()
    """Recording rules and alerts; one release of the cluster does for all."""

    dashboards: Dashboards = Dashboards()
    """Dashboards; one release of the cluster does for all."""


class Submitters(ChartModel):
    """Who may start jobs."""

    subjects: Objects = Field(default_factory=list)
    """Users, groups and service accounts, as in a RoleBinding; none makes no role, and no service account for jobs
    that look servers up in the cluster."""


class Test(ChartModel):
    """What `helm test` runs."""

    enabled: bool = True
    """A pod that asks every kind of server whether it is ready."""


class Values(ChartModel):
    """values.yaml of the chart."""

    name_override: str = Field("", max_length=40)
    """First part of all names; empty takes the release's."""

    cluster_domain: str = "cluster.local"
    """Domain of the cluster's names."""

    images: Images = Images()
    """Where images come from."""

    teacher: Teacher = Teacher()
    """Teacher servers."""

    rollout: Rollout = Rollout()
    """Rollout servers."""

    auth: Auth = Auth()
    """Who may use the servers: a Secret of tokens, or anybody; config.server.auth of a server adds JSON web tokens and
    client certificates. Nothing is installed before one of them is chosen."""

    tls: Tls = Tls()
    """Encryption of gRPC and REST; off where nothing is set."""

    network_policy: NetworkPolicy = NetworkPolicy()
    """Who reaches the servers, and whom they reach; all else is denied. No policy sees RDMA."""

    pod_security: PodSecurity = PodSecurity()
    """The user of all pods."""

    service_account: ServiceAccount = ServiceAccount()
    """Whom the pods run as towards Kubernetes."""

    model_cache: ModelCache = ModelCache()
    """The volume that hf:// models are fetched into; `helm uninstall` leaves it."""

    monitoring: Monitoring = Monitoring()
    """What Prometheus and Grafana are told."""

    submitters: Submitters = Submitters()
    """Who may start, watch and end training jobs in the release's namespace."""

    test: Test = Test()
    """What `helm test` runs."""
