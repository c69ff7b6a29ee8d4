"""A real API server of Kubernetes with its etcd, as processes, and what an old one must be told differently."""

from __future__ import annotations

import copy
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from kubernetes.utils import parse_quantity

from tests.support.certificates import CertificateAuthority
from tests.support.free_port import free_port
from tests.system.processes import ROOT, Processes

BINARIES = ROOT / ".cache" / "kubernetes"
ADMIN, PERSON = "admin-token", "person-token"
GROUP = "researchers"  # that the person belongs to
NAMESPACE = "research"

Object = dict[str, Any]

# What 1.20 has under another version, and keys that it does not know, which it drops.
_OLDER = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}
UNKNOWN = frozenset({"unhealthyPodEvictionPolicy", "persistentVolumeClaimRetentionPolicy"})
_NEW_IN_SCHEMAS = ("x-kubernetes-validations", "x-kubernetes-list-map-keys", "x-kubernetes-list-type", "default")


class ApiServer:
    """It answers, without controllers: what is stored stays as it is."""

    def __init__(self, processes: Processes, directory: Path, *, address: str = "127.0.0.1") -> None:
        """Start both. `address` is where pods would find it."""
        directory.mkdir()
        authority = CertificateAuthority(directory)
        pair = authority.issue("kube-apiserver", ["localhost"])
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        signing = directory / "accounts.key"
        signing.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        tokens = directory / "tokens.csv"
        tokens.write_text(f'{ADMIN},admin,1,"system:masters"\n{PERSON},ann,2,"{GROUP}"\n', encoding="utf-8")
        etcd, peer, self.address = free_port(), free_port(), f"https://127.0.0.1:{free_port()}"
        processes.start(
            "etcd",
            directory,
            str(BINARIES / "etcd"),
            "--data-dir=etcd",
            "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        )
        self.process = processes.start(
            "kube-apiserver",
            directory,
            str(BINARIES / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            f"--advertise-address={address}",
            "--endpoint-reconciler-type=none",
            f"--secure-port={self.address.rpartition(':')[2]}",
            f"--tls-cert-file={pair.cert}",
            f"--tls-private-key-file={pair.key}",
            f"--cert-dir={directory}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",  # no controller makes accounts here
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={signing}",
            f"--service-account-signing-key-file={signing}",
        )
        self.signing_key = signing
        self._authority = authority.cert
        self._directory = directory
        self.admin = self.client(ADMIN)
        self.process.until(self._is_ready)

    def close(self) -> None:
        """Of the connections to it; the processes end by themselves."""
        self.admin.close()

    def client(self, token: str) -> httpx.Client:
        """One that shows a token."""
        headers = {"Authorization": f"Bearer {token}"}
        trusting = ssl.create_default_context(cafile=self._authority)
        return httpx.Client(base_url=self.address, headers=headers, verify=trusting, timeout=60)

    def kubeconfig(self, token: str, name: str) -> Path:
        """A file for who has this token."""
        path = self._directory / f"{name}.kubeconfig"
        cluster = {"server": self.address, "certificate-authority": str(self._authority)}
        tree = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": name, "namespace": NAMESPACE}}],
            "current-context": "here",
        }
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def define(self, definition: Object) -> None:
        """Teach it a custom resource, and wait until it knows it."""
        old = older_definition(definition)
        self.send(old)
        name = definition["metadata"]["name"]
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"

        def is_established() -> bool:
            conditions = self.admin.get(path).json().get("status", {}).get("conditions") or ()
            return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)

        self.process.until(is_established)

    def send(self, manifest: Object, *, is_only_tried: bool = False) -> Object:
        """What it makes of a new object; fails with what it says against it."""
        parameters = {"dryRun": "All"} if is_only_tried else {}
        answer = self.admin.post(self._path(manifest), json=manifest, params=parameters)
        made: Object = answer.json()
        assert answer.status_code == 201, made.get("message", made)
        return made

    def holds(self, manifest: Object) -> bool:
        """Whether there is an object of this kind and name."""
        return self.admin.get(f"{self._path(manifest)}/{manifest['metadata']['name']}").status_code == 200

    def knows(self, manifest: Object) -> bool:
        """Whether it serves this kind."""
        return self._resource(manifest) is not None

    def _path(self, manifest: Object) -> str:
        found = self._resource(manifest)
        assert found is not None, f"it has no {manifest['kind']} of {manifest['apiVersion']}"
        where = f"namespaces/{NAMESPACE}/" if found["namespaced"] else ""
        return f"{_base(manifest['apiVersion'])}/{where}{found['name']}"

    def _resource(self, manifest: Object) -> Object | None:
        listed = self.admin.get(_base(manifest["apiVersion"]))
        resources = listed.json()["resources"] if listed.status_code == 200 else ()
        return next((one for one in resources if one["kind"] == manifest["kind"] and "/" not in one["name"]), None)

    def _is_ready(self) -> bool:
        try:
            return self.admin.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


def _base(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def older(manifest: Mapping[str, Any]) -> Object:
    """An object as 1.20 takes it."""
    changed: Object = copy.deepcopy(dict(manifest))
    changed["apiVersion"] = _OLDER.get(changed["apiVersion"], changed["apiVersion"])
    return changed


def older_definition(definition: Mapping[str, Any]) -> Object:
    """A definition of a custom resource without what 1.20 cannot read: rules in CEL, defaults, keys of lists."""
    changed: Object = copy.deepcopy(dict(definition))
    changed.pop("status", None)
    for version in changed["spec"]["versions"]:
        version.pop("selectableFields", None)
        version["schema"]["openAPIV3Schema"] = _older_schema(version["schema"]["openAPIV3Schema"])
    return changed


def _older_schema(node: Any, *, is_properties: bool = False) -> Any:
    """`is_properties`: its keys are names, and no words of the schema."""
    if isinstance(node, list):
        return [_older_schema(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _older_schema(value, is_properties=key == "properties" and not is_properties)
        for key, value in node.items()
        if is_properties or key not in _NEW_IN_SCHEMAS
    }


def lost(sent: Any, made: Any, where: str = "") -> Iterator[str]:
    """What was sent, and is not there any more as it was; keys that 1.20 does not know aside."""
    if isinstance(sent, dict):
        for key, value in sent.items():
            if key not in UNKNOWN:
                yield from lost(value, made.get(key) if isinstance(made, dict) else None, f"{where}.{key}")
    elif isinstance(sent, list):
        if not isinstance(made, list) or len(made) != len(sent):
            yield f"{where}: {sent} became {made}"
            return
        for index, (one, other) in enumerate(zip(sent, made, strict=True)):
            yield from lost(one, other, f"{where}[{index}]")
    elif not _is_same(sent, made):
        yield f"{where}: {sent!r} became {made!r}"


def _is_same(sent: Any, made: Any) -> bool:
    """An empty text and a missing one are, and so are two ways to write a quantity."""
    if sent == made or (sent in (None, "") and made is None):
        return True
    try:
        return bool(parse_quantity(sent) == parse_quantity(made))
    except (ValueError, TypeError):
        return False
