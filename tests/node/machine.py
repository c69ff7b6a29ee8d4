"""A node of Kubernetes with what controls it, as processes of the tests, in namespaces of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.node import apart, image
from tests.node.api_server import ADMIN, BINARIES, ApiServer
from tests.support.free_port import free_port
from tests.system.processes import ROOT, Process, Processes

NAME = "node1"
DOMAIN = "cluster.local"

_PACKAGES = ROOT / ".cache" / "kubernetes-node" / "usr"
_STORE = ROOT / ".cache" / "kubernetes-node" / "containerd"
_PATH = os.pathsep.join([str(_PACKAGES / "bin"), str(_PACKAGES / "sbin"), os.environ["PATH"]])
_CONTAINERD = "/run/containerd/containerd.sock"
_GROUP = "kdmesh-node"
_PODS = "10.201.0.0/24"
_READY_S = 300.0


class Node:
    """Ready for pods. It has no kube-proxy: an address of a Service that is not headless leads nowhere."""

    def __init__(self, processes: Processes, directory: Path, server: ApiServer) -> None:
        """Start all of it; `server` must be reached at the loopback of these namespaces."""
        directory.mkdir()
        self._directory = directory
        self._processes = processes
        self._server = server
        self._config = str(server.kubeconfig(ADMIN, "node"))
        apart.make_control_groups(_GROUP)
        self._containers = self._start_containerd()
        self._control("kube-controller-manager", f"--service-account-private-key-file={server.signing_key}")
        self._control("kube-scheduler")
        self._kubelet = self._start_kubelet()
        self._kubelet.until(self._is_ready, within_s=_READY_S)

    def close(self) -> None:
        """End all pods, which do not end with the kubelet, and forget them."""
        _end(self._kubelet)
        for task in self._ctr("tasks", "list", "--quiet").split():
            self._ctr("tasks", "delete", "--force", task)
        for container in self._ctr("containers", "list", "--quiet").split():
            self._ctr("containers", "delete", container)
        _end(self._containers)
        apart.remove_control_groups(_GROUP)

    def _start_containerd(self) -> Process:
        settings = self._directory / "containerd.toml"
        networks = self._directory / "networks"
        networks.mkdir()
        bridge = {
            "type": "bridge",
            "bridge": "pods",
            "isGateway": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": _PODS}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }
        network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}
        (networks / "pods.conflist").write_text(json.dumps(network), encoding="utf-8")
        # Whether this machine lets root lower what makes the kernel kill a process first is not said; nobody needs it.
        settings.write_text(
            f"""
version = 2
root = "{_STORE}"
state = "/run/containerd"
[grpc]
address = "{_CONTAINERD}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image.PAUSE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{_PACKAGES / "lib" / "cni"}"
conf_dir = "{networks}"
""",
            encoding="utf-8",
        )
        # What it has imported is kept between runs, since that takes long.
        imported, wanted = _STORE / "imported", image.identity()
        is_there = imported.exists() and imported.read_text("utf-8") == wanted
        if not is_there:
            shutil.rmtree(_STORE, ignore_errors=True)
        process = self._start("containerd", "--config", str(settings))
        process.until(lambda: self._succeeds("version"))
        if not is_there:
            self._ctr("images", "import", str(image.SAVED))
            imported.write_text(wanted, encoding="utf-8")
        return process

    def _control(self, program: str, *more: str) -> None:
        self._start(
            program,
            f"--kubeconfig={self._config}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--port=0",
            f"--secure-port={free_port()}",
            f"--cert-dir={self._directory}",
            *more,
        )

    def _start_kubelet(self) -> Process:
        path = self._directory / "kubelet.yaml"
        path.write_text(yaml.safe_dump(self._kubelet_settings()), encoding="utf-8")
        return self._start(
            "kubelet",
            f"--config={path}",
            f"--kubeconfig={self._config}",
            f"--hostname-override={NAME}",
            f"--node-ip={apart.ADDRESS}",
            f"--root-dir={self._directory / 'kubelet'}",
            f"--cert-dir={self._directory}",
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{_CONTAINERD}",
        )

    def _kubelet_settings(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupRoot": f"/{_GROUP}",
            "cgroupDriver": "cgroupfs",
            "clusterDNS": [apart.ADDRESS],
            "clusterDomain": DOMAIN,
            "evictionHard": {"memory.available": "1Mi"},  # a disk that others fill is none of its business
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,  # no image can be fetched again
            "makeIPTablesUtilChains": False,
            "oomScoreAdj": 0,
            "resolvConf": "",
            "volumePluginDir": str(self._directory / "plugins"),
        }

    def _start(self, program: str, *arguments: str) -> Process:
        built = BINARIES / program
        command = str(built) if built.exists() else str(_PACKAGES / "bin" / program)
        return self._processes.start(program, self._directory, command, *arguments, PATH=_PATH)

    def _is_ready(self) -> bool:
        answer = self._server.admin.get(f"/api/v1/nodes/{NAME}")
        if answer.status_code != 200:
            return False
        conditions = answer.json()["status"].get("conditions") or ()
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def _succeeds(self, *arguments: str) -> bool:
        return subprocess.run(self._ctr_command(*arguments), capture_output=True).returncode == 0

    def _ctr(self, *arguments: str) -> str:
        done = subprocess.run(self._ctr_command(*arguments), capture_output=True, text=True)
        assert done.returncode == 0, f"ctr {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def _ctr_command(self, *arguments: str) -> list[str]:
        return [str(_PACKAGES / "bin" / "ctr"), "--address", _CONTAINERD, "--namespace", "k8s.io", *arguments]


def _end(process: Process) -> None:
    process.signal(signal.SIGKILL)
    process.exit_code()
