"""The pod of one node of a training job, the same in every kind of job."""

from __future__ import annotations

from typing import Any

from kdmesh.cluster.plan import CONFIG, CONFIG_FILE, STOPPED, TEMPORARY, WORK, JobPlan, Mount, Taint

CONTAINER = "node"
"""Kubeflow Trainer writes its variables into the container of this name."""

RENDEZVOUS_PORT = 29500
JOB_LABEL = "kdmesh.dev/job"
LABELS = {"app.kubernetes.io/name": "kdmesh", "app.kubernetes.io/component": "trainer"}
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
_SHARED_MEMORY = "8Gi"  # at most; NCCL and the loaders of data use some of it


def pod_template(plan: JobPlan, *, first_node: str) -> dict[str, Any]:
    """Fit for Pod Security *restricted*.

    Args:
        first_node: the name that every node finds the first one by.
    """
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": plan.grace_s,
        "automountServiceAccountToken": plan.asks_cluster,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": plan.user,
            "runAsGroup": plan.user,
            "fsGroup": plan.user,
            "fsGroupChangePolicy": "OnRootMismatch",  # a claim full of checkpoints is not walked through at each start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(plan, first_node)],
        "volumes": _volumes(plan),
    }
    if plan.service_account is not None:
        spec["serviceAccountName"] = plan.service_account
    if plan.node_labels:
        spec["nodeSelector"] = dict(plan.node_labels)
    if plan.pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": plan.pull_secret}]
    # Machines with GPUs are usually kept for those who ask for them.
    of_gpus = (Taint(key=plan.resources.gpu_resource, effect="NoSchedule"),) if plan.resources.gpus else ()
    if taints := (*of_gpus, *plan.tolerated):
        spec["tolerations"] = list(map(_toleration, taints))
    return {"metadata": {"labels": {**LABELS, JOB_LABEL: plan.name}}, "spec": spec}


def _toleration(taint: Taint) -> dict[str, str]:
    told = {"operator": "Exists"} if taint.value is None else {"operator": "Equal", "value": taint.value}
    return {"key": taint.key, **told, **({} if taint.effect is None else {"effect": taint.effect})}


def _container(plan: JobPlan, first_node: str) -> dict[str, Any]:
    return {
        "name": CONTAINER,
        "image": plan.image,
        "command": ["kdmesh", "train", str(CONFIG / CONFIG_FILE)],
        "workingDir": str(WORK),
        "env": _environment(plan, first_node),
        "ports": _ports(plan),
        "resources": _resources(plan),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": str(CONFIG), "readOnly": True},
            {"name": "output", "mountPath": str(WORK)},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "temporary", "mountPath": str(TEMPORARY)},
            *(
                {"name": f"mount-{index}", "mountPath": str(mount.path), "readOnly": mount.is_read_only}
                for index, mount in enumerate(plan.mounts)
            ),
        ],
    }


def _ports(plan: JobPlan) -> list[dict[str, Any]]:
    """The chart's PodMonitor looks for the one that is called metrics."""
    ports = {"rendezvous": RENDEZVOUS_PORT, "metrics": plan.metrics_port}
    return [{"name": name, "containerPort": port} for name, port in ports.items() if port is not None]


def _environment(plan: JobPlan, first_node: str) -> list[dict[str, Any]]:
    """What torchrun's agent goes by, and what a user without a home needs."""
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_ANNOTATION}']"}}
    plain = {
        "PET_NNODES": str(plan.nodes),
        "PET_NPROC_PER_NODE": str(plan.resources.ranks),
        "PET_MASTER_ADDR": first_node,
        "PET_MASTER_PORT": str(RENDEZVOUS_PORT),
        "KDMESH_EXIT_WHEN_STOPPED": str(STOPPED),
        "HOME": str(TEMPORARY),
        "USER": "kdmesh",  # the number of the user has no name in the image
        "HF_HUB_OFFLINE": "1",
        **dict(plan.variables),
    }
    return [
        {"name": "PET_NODE_RANK", "valueFrom": index},
        {"name": "KDMESH_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "KDMESH_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        *({"name": name, "value": value} for name, value in plain.items()),
        *(
            {"name": one.name, "valueFrom": {"secretKeyRef": {"name": one.secret, "key": one.key}}}
            for one in plan.secrets
        ),
    ]


def _resources(plan: JobPlan) -> dict[str, Any]:
    resources = plan.resources
    devices = dict(resources.others)
    if resources.gpus:
        devices[resources.gpu_resource] = str(resources.gpus)
    return {
        "requests": {"cpu": resources.cpus, "memory": resources.memory, **devices},
        "limits": {"memory": resources.memory, **devices},  # no limit of CPU: it would slow what others leave idle
    }


def _volumes(plan: JobPlan) -> list[dict[str, Any]]:
    return [
        {"name": "config", "configMap": {"name": config_name(plan)}},
        {"name": "output", "persistentVolumeClaim": {"claimName": plan.output.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
        {"name": "temporary", "emptyDir": {}},
        *({"name": f"mount-{index}", **_source(mount)} for index, mount in enumerate(plan.mounts)),
    ]


def _source(mount: Mount) -> dict[str, Any]:
    if mount.kind == "secret":
        return {"secret": {"secretName": mount.source, "defaultMode": 0o440}}
    return {"persistentVolumeClaim": {"claimName": mount.source, "readOnly": mount.is_read_only}}


def config_name(plan: JobPlan) -> str:
    """Of the ConfigMap that holds the configuration."""
    return f"{plan.name}-config"
