"""The kinds of objects that kdmesh reads and writes in a cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind, in the version that is spoken."""

    name: str
    plural: str
    group: str  # empty for the core of Kubernetes
    version: str
    is_namespaced: bool = True
    project: str = ""  # that brings it, where Kubernetes does not

    @property
    def api_version(self) -> str:
        """As in manifests."""
        return f"{self.group}/{self.version}" if self.group else self.version


CONFIG_MAP = Kind(name="ConfigMap", plural="configmaps", group="", version="v1")
CLAIM = Kind(name="PersistentVolumeClaim", plural="persistentvolumeclaims", group="", version="v1")
POD = Kind(name="Pod", plural="pods", group="", version="v1")
EVENT = Kind(name="Event", plural="events", group="", version="v1")
NODE = Kind(name="Node", plural="nodes", group="", version="v1", is_namespaced=False)
STORAGE_CLASS = Kind(
    name="StorageClass", plural="storageclasses", group="storage.k8s.io", version="v1", is_namespaced=False
)
ENDPOINT_SLICE = Kind(name="EndpointSlice", plural="endpointslices", group="discovery.k8s.io", version="v1")
JOB = Kind(name="Job", plural="jobs", group="batch", version="v1")
JOB_SET = Kind(
    name="JobSet",
    plural="jobsets",
    group="jobset.x-k8s.io",
    version="v1alpha2",
    project="JobSet (https://jobset.sigs.k8s.io)",
)
_TRAINER = "Kubeflow Trainer (https://www.kubeflow.org/docs/components/trainer)"
TRAIN_JOB = Kind(
    name="TrainJob", plural="trainjobs", group="trainer.kubeflow.org", version="v1alpha1", project=_TRAINER
)
TRAINING_RUNTIME = Kind(
    name="TrainingRuntime",
    plural="trainingruntimes",
    group="trainer.kubeflow.org",
    version="v1alpha1",
    project=_TRAINER,
)

TRAINING = (TRAIN_JOB, JOB_SET, JOB)
"""What a training job can be, the most able first."""

KINDS = {kind.name: kind for kind in (CONFIG_MAP, CLAIM, POD, EVENT, ENDPOINT_SLICE, *TRAINING, TRAINING_RUNTIME)}
